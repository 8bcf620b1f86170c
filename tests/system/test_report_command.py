"""The report of a real run, from another directory and through a path with spaces."""

import html
import json

from commands import finish, start_afresh


def test_captions_of_before_and_after(finished):
    elsewhere = finished.workdir.parents[1]
    page = finished.workdir / "report.html"
    written_by_training = page.read_text()
    page.unlink()
    done = finish(start_afresh("balcap_jax.report", str(finished.workdir.relative_to(elsewhere)), cwd=elsewhere))
    assert done.stderr == ""
    text = page.read_text()
    assert str(page.relative_to(elsewhere)) in done.stdout
    for label in ("sft", "rl"):
        lines = (finished.workdir / "samples" / f"eval-{label}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert len(records) == 4
        shown = [
            html.escape(record["captions"][0]["caption"]) in text
            and html.escape(record["captions"][0]["caption"]) in written_by_training
            for record in records
        ]
        assert all(shown), label
