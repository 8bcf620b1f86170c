"""`--print_sharding`, and the sizes of published models that recipes carry."""

import jax
import pytest

from balcap_jax import train
from balcap_jax.aot import print_sharding
from balcap_jax.cli.errors import UserError
from balcap_jax.config import recipes as configuration
from balcap_jax.parallel import sharding


def mesh_of(**sizes):
    sizes = {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1} | sizes
    return sharding.make_mesh(sizes, jax.devices()[: sizes["data"] * sizes["fsdp"] * sizes["tensor"]])


def test_the_table_says_where_each_parameter_lies():
    config = configuration.load("configs/qwen25vl_7b.py")
    table = print_sharding.describe(config, mesh_of(data=2, fsdp=2, tensor=2))
    rows = {line.split()[0]: line for line in table.splitlines()}
    down = "decoder/layers/down/kernel"
    mib = 28 * 18944 * 3584 * 4 / 4 / 2**20
    assert rows[down].split() == [
        *(down, "28x18944x3584", "float32"),
        *("-,", "tensor,", "fsdp", "-,", "fsdp+tensor,", "-", f"{mib:.2f}"),
    ]
    assert "the reference" not in table
    assert "a copy of the decoder while sampling" in table
    assert "bfloat16, frozen" in rows["vision/patch/kernel"]
    assert "8,292,166,656 parameters, 7,615,616,512 trained" in table


def test_the_table_of_one_device_splits_nothing():
    table = print_sharding.describe(configuration.load("configs/scenes.py", {"loss.kl_coef": "0.1"}), mesh_of())
    assert "whole" in table
    assert not any(axis in line for line in table.splitlines()[1:-2] for axis in ("fsdp", "tensor"))
    assert "the reference" in table
    assert "while sampling" not in table.splitlines()[-1]


def test_the_table_is_printed_and_nothing_is_trained(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--config=scenes", "--print_sharding"])
    assert "decoder/embed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_mesh_that_does_not_divide_is_named():
    with pytest.raises(UserError, match=r"mesh\.tensor = 8 does not divide an axis of size 4 of parameter decoder"):
        print_sharding.describe(configuration.load("configs/qwen25vl_7b.py"), mesh_of(tensor=8))
