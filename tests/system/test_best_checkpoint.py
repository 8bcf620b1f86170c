"""checkpoint.best_metric: the best checkpoint outlives newer ones and a kill, and is a model of its own."""

import json
import signal

from command_runs import (
    arguments,
    assert_same_run,
    checkpoints,
    finish,
    read_arrays,
    read_metrics,
    read_model,
    start_interrupted,
    train,
)

BEST = {"checkpoint__best_metric": "b_capscore", "checkpoint__keep": 1, "stages__rl__eval_every": 2}
# A checkpoint holds the parameters at the start of the stage too, which the KL term compares with.
BEST |= {"stages__order": "rl", "loss__kl_coef": 0.5, "checkpoint__asynchronous": False}


def best_of(workdir) -> dict:
    return json.loads((workdir / "summary.json").read_text())["best"]


def test_the_best_checkpoint_stays_through_a_kill(tmp_path, data_dir):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = train(straight, data_dir, **BEST)
    best = best_of(straight)
    assert set(best["scores"]) == {"2", "4", "6"}
    known = {int(step): score for step, score in best["scores"].items() if score is not None}
    assert best["step"] == max(sorted(known), key=known.get)
    assert f"(step {best['step']}, validation b_capscore" in done.stdout
    assert best["step"] in checkpoints(straight)
    model = read_model(straight / "best")
    saved = read_arrays(straight / "checkpoints" / str(best["step"]) / "arrays")
    for name, array in model.items():
        assert array.tobytes() == saved[f"['state']['params']{name}"].tobytes(), name

    done = start_interrupted(signal.SIGKILL, "log:5", *arguments(killed, data_dir, **BEST))
    finish(done, -signal.SIGKILL)
    train(killed, data_dir, **BEST)
    assert best_of(killed) == best
    assert_same_run(killed, straight)
    divergence = [line["kl"] for line in read_metrics(killed)]
    assert divergence[0] < 1e-6 < divergence[-1], "the KL term never left 0: nothing was tested"
    other = read_model(killed / "best")
    assert all(other[name].tobytes() == array.tobytes() for name, array in model.items())
