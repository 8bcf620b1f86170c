"""A run with Weights & Biases: its numbers and captions go there, over a restart too, and a failure ends nothing."""

import json

from command_runs import arguments, finish, start_script

from balcap_jax.training.weights_and_biases import RUN_ID


def test_numbers_and_captions_go_there_until_it_fails(tmp_path, data_dir):
    workdir, log = tmp_path / "run", tmp_path / "calls.jsonl"
    given = arguments(workdir, data_dir, log__wandb="captioners", stages__rl__eval_every=0)
    done = finish(start_script("with_wandb.py", str(log), "8", *given))
    assert done.stderr == (
        "log.wandb: ConnectionError: the service is gone; the run goes on without Weights & Biases, "
        "metrics.jsonl has all numbers\n"
    )
    began, *calls = map(json.loads, log.read_text().splitlines())
    run_id = (workdir / RUN_ID).read_text().strip()
    assert (began["project"], began["name"], began["id"], began["resume"]) == ("captioners", "micro", run_id, "allow")
    assert (began["dir"], began["config"]["log"]["wandb"]) == (str(workdir), "captioners")

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    numbers = [call for call in calls if not any(name.endswith("/completions") for name in call["values"])]
    assert [call["step"] for call in numbers] == list(range(1, 8))
    for line, call in zip(lines, numbers, strict=False):
        stage = line["stage"]
        assert call["values"] == {
            f"{stage}/{name}": value
            for name, value in line.items()
            if name not in ("step", "stage") and value is not None
        }

    (table,) = [call for call in calls if call not in numbers]
    assert table["step"] == 6
    table = table["values"]["rl/completions"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    samples = [json.loads(line) for line in (workdir / "samples" / "step-000006.jsonl").read_text().splitlines()]
    captions = [(record, caption) for record in samples for caption in record["captions"]]
    assert len(rows) == len(captions) == 4 * 3
    for row, (record, caption) in zip(rows, captions, strict=True):
        assert (row["step"], row["id"], row["reference"]) == (6, record["id"], record["reference"])
        assert {name: row[name] for name in ("caption", "words", "tokens", "in_band", "truncated", "b_capscore")} == {
            name: caption[name] for name in ("caption", "words", "tokens", "in_band", "truncated", "b_capscore")
        }
        assert {name: row[name] for name in caption["rewards"]} == caption["rewards"]
        assert (row["picture"]["size"], row["picture"]["mode"], row["failures"]) == ([24, 24], "RGB", "")
    assert len({tuple(row["picture"]["first"]) for row in rows}) > 1  # each has its own prompt's picture

    # More steps, in the same run there.
    more = arguments(workdir, data_dir, log__wandb="captioners", stages__rl__eval_every=0, stages__rl__steps=7)
    finish(start_script("with_wandb.py", str(log), "0", *more))
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    again = max(i for i, call in enumerate(calls) if call["call"] == "init")
    assert again > 0
    assert calls[again]["id"] == run_id
    assert [call.get("step") for call in calls[again + 1 :]] == [11, None]
    assert calls[-1]["call"] == "finish"
