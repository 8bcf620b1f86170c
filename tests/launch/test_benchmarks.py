"""What the benchmarks compare before they report: the peers' contract, refusals, the inputs both sides are given."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from balcap_jax.cli.errors import UserError
from balcap_jax.models import decoder
from balcap_jax.models.policy import Prompt

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import advantages as advantages_benchmark  # noqa: E402
import generate  # noqa: E402
import load_memory  # noqa: E402
import peer  # noqa: E402
import rollout_memory  # noqa: E402
import scaling  # noqa: E402
import update  # noqa: E402

ECHO = """
import sys
sys.path.insert(0, {peers!r})
from answers import Answers, requests
print("noise before the contract")
answer = Answers()
print("noise")
for request in requests():
    if request.get("fail"):
        raise SystemExit("no such table")
    answer(doubled=2 * request["number"])
"""


@pytest.fixture
def echo(tmp_path):
    source = ECHO.format(peers=str(BENCHMARKS / "peers")).replace('print("noise before the contract")\n', "")
    (tmp_path / "echo.py").write_text(source)
    with peer.Peer(sys.executable, "echo.py", tmp_path) as process:
        yield process


def test_a_peer_answers_in_order_and_its_noise_is_no_answer(echo):
    assert echo.ask(number=2) == {"doubled": 4}
    echo.tell(number=3)
    echo.tell(number=4)
    assert [echo.answer()["doubled"], echo.answer()["doubled"]] == [6, 8]


def test_a_peer_that_ends_is_quoted(echo):
    with pytest.raises(UserError, match=r"echo gave no answer \(exit status 1\): no such table"):
        echo.ask(fail=True)
    with pytest.raises(UserError, match="no answer"):
        echo.ask(number=1)


def test_a_peer_whose_python_is_missing():
    with pytest.raises(UserError, match=r"trl_update: its Python /nowhere/python does not start"):
        peer.Peer("/nowhere/python", "trl_update.py")


def test_compare_refuses_beyond_the_tolerance(capsys):
    peer.compare("loss", 1.00009, 1.0, 1e-4)
    assert "relative difference 9.0e-05" in capsys.readouterr().out
    for ours, theirs in ((1.00011, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (1.0, float("nan"))):
        with pytest.raises(UserError, match="no times are reported"):
            peer.compare("loss", ours, theirs, 1e-4)


def test_sides_take_turns():
    order = []

    def side(name):
        return lambda: order.append(name) or float(len(order))

    assert peer.take_turns({"a": side("a"), "b": side("b")}, 2) == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert order == ["a", "b", "a", "b"]


def test_greedy_tokens_must_agree():
    ours = np.array([[1, 2, 3], [4, 5, 6]])
    generate.compare_greedy("peer", ours, ours.tolist())
    for theirs in ([[1, 2, 3], [4, 5, 7]], [[1, 2, 3]], [[1, 2], [4, 5]]):
        with pytest.raises(UserError, match="not one computation"):
            generate.compare_greedy("peer", ours, theirs)


def test_update_gives_both_sides_one_batch(tmp_path):
    """The clipped loss of the peer's rows, written here and without a shared prompt, is what our step reports."""
    config = decoder.DecoderConfig(32, 16, 1, 2, 1, 8, 16, tied_embeddings=True)
    shape = generate.Shape(config, batch=2, group=3, prompt=5, response=4)
    params = decoder.init(config, jax.random.key(0))
    batch = update.make_batch(shape, params)
    step = update.OurStep(shape, "none", params, batch)
    step()

    update.write_batch(tmp_path / "batch.npz", batch)
    rows = np.load(tmp_path / "batch.npz")
    prompts, count = rows["prompt_ids"].astype(np.int32), shape.batch * shape.group
    prompt = Prompt(
        prompts, np.ones(prompts.shape, bool), np.tile(np.arange(shape.prompt), (count, 1)), np.zeros((count, 0), "u1")
    )
    responses = rows["completion_ids"].astype(np.int32)
    policy = update.make_policy(shape, "none")
    nothing = np.zeros((count, 1, 16), np.float32)
    log_probs = jax.jit(policy.log_probs)({"decoder": params}, prompt, nothing, responses[:, None])[:, 0]
    ratio = np.exp(log_probs - rows["old_per_token_logps"])
    advantage = rows["advantages"][:, None]
    clipped = np.clip(ratio, 1 - update.CLIP, 1 + update.CLIP)
    assert (ratio != clipped).any()
    loss = -np.minimum(ratio * advantage, clipped * advantage).mean()
    assert abs(loss) > 1e-3
    np.testing.assert_allclose(step.loss, loss, rtol=1e-4)


def test_advantages_benchmark_sees_a_wrong_eps():
    tables = advantages_benchmark.golden_tables() + advantages_benchmark.random_tables(20)
    settings = advantages_benchmark.SETTINGS["trl"]["gdpo"]
    same = [advantages_benchmark.ours(one, **settings).tolist() for one in tables]
    assert advantages_benchmark.largest_difference(tables, same, settings) == 0
    other = settings | {"eps_group": 1e-2}
    assert advantages_benchmark.largest_difference(tables, same, other) > advantages_benchmark.TOLERANCE


def test_random_tables_fit_the_padding():
    shapes = {np.shape(one["rewards"]) for one in advantages_benchmark.random_tables(200)}
    largest = np.max(list(shapes), axis=0)
    assert tuple(largest) == advantages_benchmark.PADDED
    assert tuple(np.min(list(shapes), axis=0)) == (2, 2, 1)
    json.dumps(advantages_benchmark.random_tables(3))  # plain lists


def test_scaling_varies_one_size_at_a_time():
    points = scaling.FULL.points()
    assert len(set(points)) == len(points)
    results = [
        {"work": "update", "form": "shared", **vars(point), "seconds": point.B * point.G * point.R + point.P}
        for point in points
    ]
    for name, values in scaling.FULL.values.items():
        found = scaling.series(scaling.FULL, results, "update", "shared", name)
        assert tuple(found) == values
        assert list(found.values()) == sorted(set(found.values()))


@pytest.mark.slow
def test_a_model_is_loaded_onto_devices_without_a_copy_on_the_host(tmp_path):
    """Of 340 MB in 24 layers, the largest parameter 101 MB: beyond them at most a few tensors of 4 MB."""
    sizes = {"width": 512, "mlp": 4096, "heads": 4, "layers": 24, "vocab": 4096, "vision_layers": 2}
    load_memory.make_checkpoint(tmp_path / "model", load_memory.SIZES | sizes | {"full_attention_layers": (1,)})
    found = load_memory.load(tmp_path / "model")
    print(found)
    assert found["held"] > 300e6
    # The threads map a tensor each; what Python and JAX take on the way comes on top.
    assert found["beyond"] < 90e6


@pytest.mark.slow
def test_the_peak_of_a_rollout_falls_with_its_parts():
    """34 MB of cache in one part, 8 MB in each of four; the rest that sampling takes is some MB."""
    assert rollout_memory.cache_bytes(small=False, parts=1) == 2 * 4 * 16 * 8 * 1024 * 8 * 64 * 4
    whole, parts = (rollout_memory.measure_apart(small=True, parts=parts) for parts in (1, 4))
    print(whole, parts)
    assert parts["tokens"] == whole["tokens"]
    assert parts["checksum"] == whole["checksum"]
    beyond = [found["peak"] - found["before"] for found in (whole, parts)]
    assert beyond[0] > rollout_memory.cache_bytes(small=True, parts=1)
    assert beyond[1] < 0.6 * beyond[0]
