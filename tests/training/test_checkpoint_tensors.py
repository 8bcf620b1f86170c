"""The tensors of a checkpoint directory, written by hand: which are passed over, which are refused by name."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.models.formats.hf import is_constant
from balcap_jax.models.formats.safetensors import DTYPE_NAMES, NewTensor, is_finite, read_directory, write_directory

WEIGHT = "model.layers.0.mlp.up_proj.weight"


def write(path: Path, *entries: tuple[str, str, list[int], bytes]) -> None:
    """A safetensors file of (name, type, shape, bytes); a name may be there twice."""
    texts, data = [], b""
    for name, dtype, shape, content in entries:
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        texts.append(f"{json.dumps(name)}: {json.dumps(entry)}")
        data += content
    header = ("{" + ", ".join(texts) + "}").encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def weight(name: str = WEIGHT, value: float = 1.0) -> tuple[str, str, list[int], bytes]:
    return name, "F32", [2, 3], np.full((2, 3), value, np.float32).tobytes()


def error_of(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "size"),
    [
        ("vision_tower.vision_model.embeddings.position_ids", "I64", [1, 10], 80),
        ("position_ids", "I32", [4], 16),
        ("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", "F32", [3], 12),
        ("model.rotary_emb.original_inv_freq", "F64", [3], 24),
        ("visual.rotary_pos_emb.inv_freq", "BF16", [4], 8),
        ("model.layers.1.self_attn.rotary_emb.cos_cached", "F16", [1, 1, 4, 2], 16),
        ("language_model.model.layers.0.self_attn.masked_bias", "F32", [], 4),
        ("language_model.model.layers.0.self_attn.bias", "BOOL", [1, 1, 4, 4], 16),
        ("model.layers.0.attn.bias", "U8", [1, 1, 3, 3], 9),
    ],
)
def test_constants_are_passed_over_whatever_their_type(tmp_path, name, dtype, shape, size):
    write(tmp_path / "model.safetensors", weight(), (name, dtype, shape, bytes(size)))
    assert list(read_directory(tmp_path, is_constant)) == [WEIGHT]


@pytest.mark.parametrize(
    ("name", "shape"),
    [("model.layers.0.self_attn.bias", [8]), ("model.position_ids.weight", [8]), ("my_inv_freq", [8]), ("extra", [8])],
)
def test_other_tensors_are_not(tmp_path, name, shape):
    write(tmp_path / "model.safetensors", weight(), (name, "F32", shape, bytes(32)))
    assert set(read_directory(tmp_path, is_constant)) == {WEIGHT, name}
    write(tmp_path / "model.safetensors", weight(), (name, "I32", shape, bytes(32)))
    assert f"tensor {name} is of type I32" in error_of(read_directory, tmp_path, is_constant)


@pytest.mark.parametrize("name", [WEIGHT, "lm_head.weight", "a\nb"])
def test_a_name_twice_in_one_file_is_refused(tmp_path, name):
    write(tmp_path / "model.safetensors", weight(name), weight("other"), weight(name, 2.0))
    assert f"{name!r} twice" in error_of(read_directory, tmp_path)


def index(directory: Path, places: list[tuple[str, str]]) -> None:
    pairs = ", ".join(f"{json.dumps(name)}: {json.dumps(file)}" for name, file in places)
    (directory / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{pairs}}}}}')


def test_a_name_twice_in_two_files_or_in_the_index_is_refused(tmp_path):
    write(tmp_path / "a.safetensors", weight(), weight("other"))
    write(tmp_path / "b.safetensors", weight(value=2.0))
    index(tmp_path, [("other", "a.safetensors"), (WEIGHT, "b.safetensors")])
    assert f"tensor {WEIGHT}" in error_of(read_directory, tmp_path)
    write(tmp_path / "a.safetensors", weight("other"))
    assert set(read_directory(tmp_path)) == {WEIGHT, "other"}
    index(tmp_path, [("other", "a.safetensors"), (WEIGHT, "a.safetensors"), (WEIGHT, "b.safetensors")])
    assert f"{WEIGHT!r} twice" in error_of(read_directory, tmp_path)


def test_the_single_file_comes_before_an_index_of_others(tmp_path):
    for name in ("a", "b", "model"):
        write(tmp_path / f"{name}.safetensors", weight(), weight(f"of_{name}"))
    index(tmp_path, [(WEIGHT, "a.safetensors"), ("of_a", "a.safetensors")])
    assert set(read_directory(tmp_path)) == {WEIGHT, "of_model"}
    write(tmp_path / "b.safetensors", weight("of_b"))
    index(tmp_path, [(WEIGHT, "model.safetensors"), ("of_model", "model.safetensors"), ("of_b", "b.safetensors")])
    assert set(read_directory(tmp_path)) == {WEIGHT, "of_model", "of_b"}


@pytest.mark.parametrize(
    "file",
    [
        *("../out.safetensors", "/out.safetensors", "..", ".", "", "sub/out.safetensors", "./out.safetensors"),
        *("a\nb.safetensors", "a\0.safetensors", "a\x1b[2J.safetensors", "a\u2028b", "x" * 300, None, 3, ["a"], {}),
    ],
)
def test_a_shard_must_be_a_file_beside_the_index(tmp_path, file):
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    for path in (tmp_path / "out.safetensors", directory / "out.safetensors"):
        write(path, weight())
    index(directory, [(WEIGHT, file)])
    message = error_of(read_directory, directory)
    assert f"tensor {WEIGHT} is in " in message
    assert len(message) < 500


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_tensor_that_is_not_finite_is_refused_by_name(tmp_path, dtype, value):
    content = np.ones((3, 200_000), dtype)
    content[1, 123_456] = -np.finfo(np.float16).max if dtype == np.float16 else ml_dtypes.finfo(dtype).min
    path = tmp_path / "model.safetensors"
    write(path, (WEIGHT, DTYPE_NAMES[content.dtype], [3, 200_000], content.tobytes()))
    np.testing.assert_array_equal(read_directory(tmp_path)[WEIGHT].read(), content)
    content[2, -1] = value
    write(path, (WEIGHT, DTYPE_NAMES[content.dtype], [3, 200_000], content.tobytes()))
    tensor = read_directory(tmp_path)[WEIGHT]
    assert error_of(tensor.read) == f"{path}: tensor {WEIGHT} holds NaN or infinity; download it again, or take an " + (
        "earlier one"
    )
    assert error_of(tensor.read, 2, 3).startswith(f"{path}: tensor {WEIGHT}")
    assert is_finite(tensor.read(1, 3))  # the other parts of it
    assert is_finite(np.zeros((0, 3), dtype))


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_what_no_reader_would_take_is_not_written(tmp_path, value):
    """NaN, or a number beyond the type that it is cast to."""
    with np.errstate(over="ignore"):
        array = np.full((2, 2), value, np.float32).astype(np.float16)
    tensor = NewTensor(WEIGHT, array.dtype, array.shape, lambda: array)
    assert f"tensor {WEIGHT} would hold NaN or infinity as float16" in error_of(
        lambda: write_directory(tmp_path, [tensor], shard_bytes=10**9, progress=lambda size: None)
    )
