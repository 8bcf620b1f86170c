"""Models in a bucket: weights are read by ranges, and written so that no reader takes a part for the whole."""

import numpy as np
import pytest
from fake_bucket import serving

from balcap_jax.cli.bucket import BucketError
from balcap_jax.cli.files import resolved
from balcap_jax.models.formats import safetensors, saving


@pytest.fixture
def server():
    with serving() as found:
        yield found


def test_of_a_tensor_the_bytes_of_a_slice_are_read(server, tmp_path):
    array = np.arange(64 * 1024, dtype=np.float32).reshape(64, 1024)
    tensors = [safetensors.NewTensor("w", array.dtype, array.shape, lambda: array)]
    safetensors.write_directory(tmp_path, tensors, shard_bytes=10**9)
    server.put("m/model.safetensors", (tmp_path / "model.safetensors").read_bytes())
    folder = safetensors.fetch(resolved("gs://bucket/m"))
    (tensor,) = safetensors.read_directory(folder).values()
    for cut, bytes_read in (
        (lambda whole: whole[8:16], 8 * 4096),
        (lambda whole: whole.T[:, 8:16], 8 * 4096),
        (lambda whole: whole[:, :1], 63 * 4096 + 4),
        (lambda whole: whole, 64 * 4096),
        (lambda whole: np.concatenate([whole[:1], whole[5:6]]), 64 * 4096),  # A copy: all of it.
        (lambda whole: whole[:0], 0),
    ):
        before = server.bytes["out"]
        np.testing.assert_array_equal(tensor.mapped(cut=cut), cut(array))
        assert server.bytes["out"] - before == bytes_read
    np.testing.assert_array_equal(tensor.read(1, 4), array[16:32])
    server.put("m/model.safetensors", server["m/model.safetensors"][:-4])
    with pytest.raises(BucketError, match=r"gs://bucket/m/model\.safetensors cannot be read \(.*OUT_OF_RANGE"):
        tensor.mapped()


def test_a_model_gets_its_config_last_and_loses_it_first(server):
    """Whatever change is the last one: with a config.json the model is the whole old or the whole new one."""
    path, order = resolved("gs://bucket/run/model"), []
    store, delete = server._store, server._object

    def stored(bucket, name, *rest):
        order.append(("put", name.removeprefix("run/model/")))
        return store(bucket, name, *rest)

    def changed(method, bucket, name, *rest):
        if method == "DELETE":
            order.append(("delete", name.removeprefix("run/model/")))
        return delete(method, bucket, name, *rest)

    server._store, server._object = stored, changed
    for text in ("old", "new"):
        with saving.written_aside(path, "the model") as aside:
            for name in ("model.safetensors", "config.json", "tokenizer.json", "adapter/adapter_config.json"):
                (aside / name).parent.mkdir(exist_ok=True)
                (aside / name).write_text(f"{text} {name}")
        assert {name: content.decode() for name, content in server.state().items()} == {
            f"run/model/{name}": f"{text} {name}"
            for name in ("model.safetensors", "config.json", "tokenizer.json", "adapter/adapter_config.json")
        }
        assert not list(path.rglob("*.safetensors"))  # It is in the bucket alone.
    first, second = order[:4], order[4:]
    assert [("put", "adapter/adapter_config.json"), ("put", "config.json")] == first[-2:] == second[-2:]
    assert second[0] == ("delete", "config.json")
    assert {kind for kind, _ in second[:4]} == {"delete"}
    assert safetensors.fetch(path) == path
    assert (path / "config.json").read_text() == "new config.json"
