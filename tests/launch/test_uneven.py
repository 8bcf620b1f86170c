"""benchmarks/uneven.py and device.sh: what is drawn, what is compared, what is printed, and what they refuse."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from balcap_jax.aot.memory import CHIPS
from balcap_jax.cli.errors import UserError
from balcap_jax.config import recipes
from balcap_jax.models import decoder
from balcap_jax.models.policy import Prompt

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "peers")]

import balcap  # noqa: E402
import chips  # noqa: E402
import device  # noqa: E402
import device_parity  # noqa: E402
import lengths  # noqa: E402
import uneven  # noqa: E402
import uneven_report  # noqa: E402

# ------------------------------------------------------------------------------------------------- uneven lengths

TINY = lengths.Shape(
    decoder.DecoderConfig(64, 16, 1, 2, 1, 8, 16, tied_embeddings=True), batch=2, group=3, prompt=5, response=16
)


@pytest.mark.parametrize("mean", ["0.1", "0.215", "0.3"])
def test_drawn_lengths_have_the_mean_and_deviation_that_is_asked_for(mean):
    shape = dataclasses.replace(TINY, batch=2000, group=8, response=1024)
    drawn = lengths.draw(np.random.default_rng(0), shape, mean, to_limit=False)
    asked = float(mean) * 1024
    # 16,000 draws: the mean's standard error is 0.4 %; whole tokens and the cut at R take at most 2 %.
    assert drawn.mean() == pytest.approx(asked, rel=0.025)
    assert drawn.std() == pytest.approx(asked / 2, rel=0.06)
    # The median of a lognormal of mean m and deviation m / 2 is m / sqrt(5 / 4).
    assert np.median(drawn) == pytest.approx(asked / 1.25**0.5, rel=0.025)
    assert drawn.min() >= 16
    assert drawn.max() <= 1024


def test_lengths_to_the_limit():
    rng = np.random.default_rng(0)
    assert lengths.draw(rng, TINY, "0.2", to_limit=True)[0, 0] == 16
    assert (lengths.draw(rng, TINY, lengths.EQUAL, to_limit=False) == 16).all()
    # A mean near the limit is cut there: the mean of what is drawn is lower.
    cut = lengths.draw(rng, dataclasses.replace(TINY, batch=2000), "1", to_limit=False)
    assert (cut == 16).mean() == pytest.approx(0.41, abs=0.03)  # P(z > sigma / 2), sigma² = log(1.25)


def test_batches_of_lengths_are_padded_to_the_longest_and_written_as_rows(tmp_path):
    batches = lengths.make_batches(TINY, "0.4", False, draws=3, seed=1)
    alone = lengths.make_batches(TINY, "0.4", False, draws=1, seed=1)[0]
    paths = lengths.write_batches(tmp_path, "0.4", batches)
    for name, array in alone.items():
        np.testing.assert_array_equal(batches[0][name], array)
    for batch, path in zip(batches, paths, strict=True):
        drawn = batch["lengths"]
        assert batch["responses"].shape == (2, 3, drawn.max())
        np.testing.assert_array_equal((batch["responses"] > 0).sum(-1), drawn)
        np.testing.assert_array_equal((batch["old_log_probs"] != 0).sum(-1), drawn)
        np.testing.assert_allclose(batch["advantages"].mean(), 0, atol=1e-6)
        rows = np.load(path)
        np.testing.assert_array_equal(rows["completion_ids"][4], batch["responses"][1, 1])
        np.testing.assert_array_equal(rows["prompt_ids"][4], batch["prompt_ids"][1])
        assert rows["lengths"][4] == drawn[1, 1]
        assert rows["advantages"][4] == batch["advantages"][1, 1]


def test_means_are_shares_of_the_limit():
    assert lengths.parse_means("0.1, 1,equal") == ("0.1", "1", "equal")
    for text in ("0", "1.5", "x", "", "0.1,", "nan"):
        with pytest.raises(UserError, match="neither a share of R above 0 and at most 1 nor equal"):
            lengths.parse_means(text)
    with pytest.raises(UserError, match="names one twice"):
        lengths.parse_means("0.1,0.1")


@pytest.fixture(scope="module")
def side(tmp_path_factory):
    """Our side of uneven.py on TINY, in this process, and a batch of it."""
    batch = lengths.make_batches(TINY, "0.4", True, draws=1, seed=0)[0]
    (path,) = lengths.write_batches(tmp_path_factory.mktemp("batches"), "0.4", [batch])
    job = {"decoder": dataclasses.asdict(TINY.decoder), "params": "", "group": 3, "response": 16, "parts": 1}
    return balcap.Side(job | {"rate": uneven.RATE, "clip": uneven.CLIP, "max_norm": uneven.MAX_NORM}), batch, path


def test_an_update_at_given_lengths(side):
    """The loss is that of the clipped surrogate, written here with one row a prompt."""
    ours, batch, path = side
    policy = balcap.make_policy(TINY.decoder, -1, forbidden=())
    drawn, rows = batch["lengths"].reshape(-1), np.load(path)
    tokens = rows["prompt_ids"].astype(np.int32)
    positions = np.tile(np.arange(5), (6, 1))
    prompt = Prompt(tokens, np.ones(tokens.shape, bool), positions, policy.no_images(6))
    responses = rows["completion_ids"].astype(np.int32)[:, None]
    embeds = np.zeros((6, 1, 16), np.float32)
    log_probs = np.asarray(jax.jit(policy.log_probs)(ours.params, prompt, embeds, responses))[:, 0]
    ratio, advantage = np.exp(log_probs - rows["old_per_token_logps"]), rows["advantages"][:, None]
    clipped = np.clip(ratio, 1 - uneven.CLIP, 1 + uneven.CLIP)
    real = np.arange(responses.shape[-1]) < drawn[:, None]
    loss = -((np.minimum(ratio * advantage, clipped * advantage) * real).sum(1) / drawn).mean()
    assert abs(loss) > 1e-3

    for mode in ("best", "padded"):
        described = ours.update(path, mode, prepare=True)
        answer = ours.update(path, mode, prepare=False)
        assert described["compile_seconds"] > 0
        assert answer["loss"] == pytest.approx(loss, rel=1e-4)
        assert answer["positions"] >= drawn.sum()
        # Nothing is compiled twice, and no update moves the weights.
        assert ours.update(path, mode, prepare=True) == described
        assert ours.update(path, mode, prepare=False)["loss"] == answer["loss"]
    assert answer["positions"] == 6 * 16


def test_a_rollout_at_given_lengths_with_and_without_limits(side):
    """A version without limits is ended by a forced end token, and samples the same tokens before it."""
    ours, batch, path = side
    drawn, answers = batch["lengths"], []
    ways = [(ours.has_limits, "best"), (ours.has_limits, "padded"), (False, "best")]
    for ours.has_limits, mode in ways:
        ours.programs, ours.policy = {}, balcap.make_policy(TINY.decoder, -1 if ours.has_limits else balcap.END)
        ours.rollout(path, mode, prepare=True)
        answers.append(ours.rollout(path, mode, prepare=False))
    for answer in answers:
        assert answer["tokens"] == answers[0]["tokens"]
        assert drawn.sum() <= answer["positions"] <= drawn.size * drawn.max()
    assert answers[-1]["positions"] == drawn.size * drawn.max()
    assert (np.array(answers[0]["tokens"])[drawn > 1] > 0).all()


def test_sides_must_have_computed_the_same():
    reference = {"loss": 0.01, "grad_norm": 2.0}
    near = {"loss": 0.010009, "grad_norm": 2.0001}
    assert uneven.check_updates("0.2", {"now": reference, "trl": near}, "float32") == pytest.approx(9e-5)
    for value in ("loss", "grad_norm"):
        for wrong in (reference[value] + 3e-4, float("nan")):
            with pytest.raises(UserError, match=f"{value} is .* of now and .* of trl .*no times are reported"):
                uneven.check_updates("0.2", {"now": reference, "trl": reference | {value: wrong}}, "float32")


def test_positions_that_a_side_computes():
    batch = {"lengths": np.array([[3, 5, 16], [2, 2, 2]])}
    assert uneven.computed("trl", batch, {}) == uneven.computed("tunix", batch, {}) == 6 * 16
    assert uneven.computed("unpadded", batch, {}) == 30
    assert uneven.computed("now", batch, {"positions": 64}) == 64


def test_bad_input_of_uneven_ends_in_one_line(capsys):
    with_torch = {"torch": "python", "tunix": ""}
    assert uneven.parse_sides("now, trl,commit", with_torch) == ("now", "trl", "commit")
    for text, message in (
        ("now,vllm", "'vllm' is none of now, padded, commit, trl"),
        ("now,tunix", "tunix needs --tunix=PYTHON"),
        ("now,now", "names one twice"),
        ("trl,now", "the first is what the others are compared with"),
    ):
        with pytest.raises(UserError, match=message):
            uneven.parse_sides(text, with_torch)
    for arguments, message in (
        (["--draws=0"], "--draws must be at least 1"),
        (["--work=updates"], "--work=updates is not of update, rollout"),
        (["--means=2"], "neither a share"),
        (["--trl_parts=3"], "--trl_parts=3 must divide the 32 responses"),
        (["--parts=3"], "--parts=3 must divide the 4 prompts"),
        (["--sides=now,refill"], "refill needs --parts=2 or more"),
        (["--sides=now,trl"], "trl needs --torch=PYTHON"),
        (["--seed=-1"], "--seed must be 0 or above"),
        (["--out=/dev/null/results.json"], "argument --out: no file can be written at /dev/null/results.json"),
        (["--plot=/"], "argument --plot: no file can be written at /"),
    ):
        with pytest.raises(SystemExit) as ended:
            uneven.main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_the_package_at_another_revision(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    (repository / "balcap_jax").mkdir(parents=True)
    monkeypatch.setattr(uneven, "ROOT", repository)
    with pytest.raises(UserError, match=r"--commit=HEAD: .*not a git repository"):
        uneven.commit_source("HEAD", tmp_path / "none")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    for text in ("first", "second"):
        (repository / "balcap_jax" / "name.py").write_text(text)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", text], check=True)
    source = uneven.commit_source("HEAD~1", tmp_path / "source")
    assert (source / "balcap_jax" / "name.py").read_text() == "first"
    with pytest.raises(UserError, match=r"--commit=nowhere: .*leave the side commit out of --sides"):
        uneven.commit_source("nowhere", tmp_path / "none")


def test_uneven_report_compares_by_round():
    def runs(*rounds):
        return {"seconds": rounds, "cpu_seconds": rounds, "useful": 0.5, "peak_gb": 1.0}

    ours = runs([1.0, 3.0], [2.0, 2.0], [4.0, 6.0])
    ours |= {"positions": 100.0, "temporaries_gb": 0.25, "compile_seconds": 3.0, "compile_cpu_seconds": 5.0}
    theirs = runs([4.0, 4.0], [10.0, 10.0], [12.0, 18.0])
    theirs |= {"positions": 250.0, "temporaries_gb": None, "compile_seconds": None, "compile_cpu_seconds": None}
    # Sums by round are 4, 4, 10 and 8, 20, 30: ratios 2, 5, 3.
    assert uneven_report.ratio(theirs["seconds"], ours["seconds"]) == 3.0
    assert uneven_report.mean_of_draws(theirs["seconds"]) == 10.0
    kinds = {"0.2": {"mean": 17.0, "longest": 64.0, "floor": 0.5}}
    table = uneven_report.markdown("rollout", "now", kinds, {"0.2": {"now": ours, "trl": theirs}}).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    assert cells[2][2:] == ["now", "2.000", "2.000", "1.00", "1.00", "1.00", "0.50", "0.250", "1.00", "3.0", "5.0"]
    assert cells[3][2:] == ["trl", "10.0", "10.0", "3.00", "3.00", "2.50", "0.50", "–", "1.00", "–", "–"]
    assert cells[4][:6] == ["0.2", "17, 64", "*floor*", "0.500", "", "0.25"]
    assert len({len(row) for row in cells}) == 1


def test_uneven_report_plots_every_side(tmp_path):
    pytest.importorskip("matplotlib")
    runs = {"seconds": [[1.0]], "useful": 0.5}
    kinds = {kind: {"mean": 1.0, "longest": 2.0, "floor": 0.1} for kind in ("0.2", "equal")}
    sides = {kind: {"now": runs, "trl": runs} for kind in kinds}
    uneven_report.plot(kinds, {"update": sides, "rollout": sides}, tmp_path / "figures" / "uneven.svg")
    text = (tmp_path / "figures" / "uneven.svg").read_text()
    assert all(word in text for word in ("now", "trl", "update, s", "rollout, s", "weights read once a step", "equal"))


@pytest.mark.slow  # starts a process for each side, which compile for a minute or two
def test_uneven_runs_whole(tmp_path):
    uneven.main(
        ["--small", "--sides=now,padded,commit", "--means=0.2,equal", "--rounds=1", f"--out={tmp_path / 'u.json'}"]
    )
    found = json.loads((tmp_path / "u.json").read_text())
    assert set(found["results"]) == {"update", "rollout"}
    for of_kind in found["results"].values():
        assert of_kind["0.2"]["now"]["useful"] >= of_kind["0.2"]["commit"]["useful"]
        assert of_kind["equal"]["commit"]["useful"] == 1
    assert found["kinds"]["equal"] == {"mean": 64.0, "longest": 64.0, "floor": pytest.approx(0, abs=1)}


@pytest.mark.slow
def test_uneven_refills(tmp_path, capsys):
    arguments = ["--small", "--sides=now,refill", "--parts=2", "--work=rollout", "--means=0.2", "--rounds=1"]
    uneven.main([*arguments, f"--out={tmp_path / 'u.json'}"])
    found = json.loads((tmp_path / "u.json").read_text())["results"]["rollout"]["0.2"]
    # Two parts of four rows, the first of which runs to the limit alone.
    assert found["refill"]["useful"] > 1.2 * found["now"]["useful"]
    assert "responses whose tokens are equal at all of our sides: 100.0 %" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- an accelerator


def test_peaks_are_those_that_aot_has():
    for kind, chip in CHIPS.items():
        if kind != "TPU7x":
            assert chips.peak_of(kind).flops == chip.flops
    assert chips.peak_of("NVIDIA H100 80GB HBM3").bandwidth == 3.35e12
    assert chips.peak_of("NVIDIA A100-SXM4-40GB").bandwidth == 1.555e12
    assert chips.peak_of("NVIDIA L40S").flops > chips.peak_of("NVIDIA L4").flops
    assert chips.peak_of("Tesla T4", bandwidth=1e11) == chips.Peak(65e12, 1e11)
    assert chips.peak_of("cpu") is chips.peak_of("cpu", flops=1e12) is None
    assert chips.peak_of("cpu", 1e12, 1e10) == chips.Peak(1e12, 1e10)
    with pytest.raises(UserError, match="--bandwidth is the rate of one device"):
        chips.peak_of("cpu", 1e12, -1.0)


def test_device_parity_has_bars():
    cpu = {"log_probs": np.array([-1.0, -2.0]), "tokens": np.arange(4), "loss/packed": np.array(0.5)}
    cpu |= {"gradient/packed/a": np.array([0.0, 10.0]), "gradient/packed/b": np.array([1.0])}
    other = cpu | {"tokens": np.array([0, 1, 2, 4]), "gradient/packed/a": np.array([0.02, 10.0])}
    found = device_parity.differences(other, cpu)
    assert found == {"log_probs": 0.0, "tokens": 0.25, "loss/packed": 0.0, "gradient/packed": pytest.approx(0.002)}
    assert [good for _, _, good in device.parity_rows(found)] == [True, False, True, False]
    # An update that skipped its gradient has nothing to compare.
    skipped = {"gradient/packed/a": np.ones(2), "gradient/packed/b": np.zeros(2)}
    assert [good for _, _, good in device.parity_rows(device_parity.differences(skipped, skipped))] == [False]


def test_device_states_shares_of_the_peak():
    found = {"time/rollout": 10, "time/judge": 0, "time/update": 4, "time/other": 1}
    found |= {"parameters": 3e9, "prompts": 8, "group": 8, "length/tokens_mean": 500, "update_flops": 4e14}
    found |= {"decode_bytes": 2e12, "padding/update_useful": 0.9}
    rows = {what.split(":")[0].strip(): value for what, value, _ in device.step_rows(found, chips.Peak(1e14, 1e12), 2)}
    assert rows["update"] == "50.0 %"  # 4e14 flops in 4 s on two devices of 1e14
    assert rows["decode"] == "10.0 %"  # 2e12 bytes in 10 s by two of 1e12 a second
    assert rows["useful share of the update"] == "0.90"
    rows = {what.split(":")[0].strip(): value for what, value, _ in device.step_rows(found, None, 2)}
    assert rows["update"] == rows["decode"] == "not known here: give --peak_flops and --bandwidth"


def test_device_overrides_fit_the_recipe():
    for small in (True, False):
        args = device.make_parser().parse_args(["--small"] if small else [])
        config = recipes.load(device.RECIPE, device.overrides(args, devices=4))
        assert config.stages.rl.batch_size == 4 * (2 if small else 8)
        assert config.rollout.max_tokens == config.rollout.buckets[-1] == (32 if small else 512)
        assert (config.model.width == 2048) is not small


def test_device_refuses_what_it_lacks(capsys, monkeypatch):
    monkeypatch.setattr(
        device, "probe", lambda: {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1, "memory": None}
    )
    for arguments, message in (
        ([], "jax sees no accelerator here, only a CPU; --small runs all parts on it"),
        (["--only=speed"], "--only=speed is not of parity, step, uneven"),
        (["--steps=0"], "--steps must be above 0"),
        (["--minutes=inf"], "--minutes must be above 0 and at most 1440, got inf"),
        (["--shape=3b"], "argument --shape: invalid choice: '3b'"),
        (["--small", "--out=/tmp"], "argument --out: no file can be written at /tmp"),
        (["--small", "--peak_flops=-1"], "--peak_flops is the rate of one device"),
    ):
        with pytest.raises(SystemExit) as ended:
            device.main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    done = subprocess.run(
        [str(BENCHMARKS / "device.sh")], env={"PATH": "/usr/bin:/bin", "PYTHON": "/nowhere/python"}, capture_output=True
    )
    assert done.returncode == 1
    assert b"error: /nowhere/python is not installed; PYTHON names another" in done.stderr


def test_a_part_that_fails_is_named_and_the_others_go_on(capsys, monkeypatch, tmp_path):
    probed = {"platform": "gpu", "kind": "NVIDIA L4", "count": 1, "processes": 1, "memory": 24e9}
    monkeypatch.setattr(device, "probe", lambda: probed)

    def failing(*_):
        raise UserError("took longer than the 3 s that were left for it")

    monkeypatch.setattr(device, "parity", failing)
    sides = {name: {"seconds": [[seconds]], "useful": 0.5} for name, seconds in (("now", 2.0), ("padded", 5.0))}
    monkeypatch.setattr(device, "uneven", lambda *_: {"results": {"update": {"0.215": sides}}})
    assert device.main(["--only=parity,uneven", f"--out={tmp_path / 'd.json'}"]) == 1
    out = capsys.readouterr().out
    assert "1 x NVIDIA L4, 24.0 GB each" in out
    assert "parity failed" in out
    assert "took longer than the 3 s" in out
    assert "2.50x" in out
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["peak"] == {"flops": 121e12, "bandwidth": 0.3e12}
    assert "took longer" in found["results"]["parity"]["error"]
    assert device.main(["--only=uneven", "--minutes=1e-9", f"--out={tmp_path / 'd.json'}"]) == 1
    assert "minutes were over before it began" in capsys.readouterr().out


def test_a_process_of_device_is_quoted_and_has_an_end(tmp_path):
    with pytest.raises(UserError, match="exit status 3: the reason"):
        device.run(["-c", "import sys; print('x'); print('the reason', file=sys.stderr); sys.exit(3)"], 60)
    with pytest.raises(UserError, match="took longer than the 1 s that were left"):
        device.run(["-c", "import time; time.sleep(60)"], 1)
    (tmp_path / "lines").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert device.whole_lines(tmp_path / "lines") == [{"a": 1}, {"a": 2}]
    assert device.whole_lines(tmp_path / "none") == []


@pytest.mark.slow  # all parts with their processes: about two minutes
def test_device_runs_whole(tmp_path):
    out = tmp_path / "device.json"
    done = subprocess.run(
        [str(BENCHMARKS / "device.sh"), "--small", "--steps=1", "--minutes=30", f"--out={out}"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    found = json.loads(out.read_text())["results"]
    # One CPU beside itself: the same bits.
    assert all(value == 0 for name, value in found["parity"].items() if name != "seconds")
    assert found["step"]["time/update"] > 0
    assert found["uneven"]["results"]["update"]["0.215"]["now"]["useful"] > 0
