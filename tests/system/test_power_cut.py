"""After a power cut the same command goes on, and ends as a run that was never cut."""

import json
import sys

import pytest
from command_runs import (
    ROOT,
    arguments,
    assert_same_arrays,
    assert_same_model,
    assert_same_run,
    checkpoints,
    read_metrics,
    read_samples,
    read_summary,
    train,
)
from power_cut import cuts

from balcap_jax.training.checksums import find_damage


def spread(cuts: list, number: int) -> list:
    return [cuts[(2 * i + 1) * len(cuts) // (2 * number)] for i in range(number)]


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_ten_power_cuts_of_a_run(tmp_path, data_dir, finished, asynchronous):
    """All cuts leave what can be read and nothing torn; ten, spread over the run, are resumed to its end."""
    workdir, every, kept = tmp_path / "run", 2, {"checkpoint__keep": 2, "checkpoint__asynchronous": asynchronous}
    command = [sys.executable, "-m", "balcap_jax.train", *arguments(workdir, data_dir, **kept)]
    found = []
    for cut in cuts(command, workdir, tmp_path / "cuts", 3, cwd=ROOT):
        log = workdir / "metrics.jsonl"
        steps = log.read_bytes().count(b"\n") if log.exists() else 0
        whole = checkpoints(cut)
        for step in whole:
            assert not find_damage(cut / "checkpoints" / str(step)), cut
        for name in ("config.json", "summary.json"):
            if (cut / name).exists():
                json.loads((cut / name).read_text())
        found.append((cut, steps, max(whole, default=0)))
    assert_same_run(workdir, finished.workdir)
    lost = max(steps - step for _, steps, step in found)
    print(f"{len(found)} cuts; at most {lost} steps are made once more")
    # A save in the background ends before the next one begins, so the one before it may still count until then.
    assert lost <= every * (2 if asynchronous else 1)

    training, ending = ([cut for cut in found if (cut[1] < 10) == under_way] for under_way in (True, False))
    for cut, steps, step in [*spread(training, 7), *spread(ending, 3)]:
        done = train(cut, data_dir, **kept)
        print(f"{cut.name}: cut in step {steps + 1}, resumed after step {step}")
        assert done.stderr == ""
        assert (f"going on after step {step} of 10" in done.stdout) == (step > 0)
        assert_same_model(cut / "model", finished.workdir / "model")
        last = checkpoints(cut)[-1]
        assert last == 10
        assert_same_arrays(*(run / "checkpoints" / "10" / "arrays" for run in (cut, finished.workdir)))
        assert read_samples(cut) == read_samples(finished.workdir)
        assert read_summary(cut) == read_summary(finished.workdir)
        ours, theirs = read_metrics(cut), read_metrics(finished.workdir)
        # What was appended since the last sync counts as lost with all that was in the file.
        assert ours == theirs[len(theirs) - len(ours) :]
        assert len(ours) >= 10 - step
        assert not list((cut / "checkpoints").glob("*incomplete*"))
        assert not list((cut / "checkpoints").glob("*tmp*"))
