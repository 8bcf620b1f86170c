"""Draws one picture with its greedy caption before and after RL: docs/figures/before_after.svg and ..._narrow.svg.

    python docs/make/before_after.py RUN    chooses a picture of a run of configs/scenes.py: before_after.json
    python docs/make/before_after.py        draws docs/figures/before_after.json again

The picture is that of the median change in b-CapScore, as the report chooses it. The run should be of the seed whose
own change is the median of those in docs/results.md. Marks are the judge's: each assertion of a caption colours the
words that make it, and reference units that the caption does not cover stand below it.
"""

import base64
import io
import json
import re
import sys
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image

from balcap_jax.data.scenes import builder, render
from balcap_jax.data.scenes.language import TOKEN, Claim
from balcap_jax.data.scenes.reading import parse
from balcap_jax.data.scenes.world import Scene
from balcap_jax.report.gallery import choose_images
from balcap_jax.report.run import load_run

FIGURES = Path(__file__).resolve().parents[1] / "figures"
RECORD = FIGURES / "before_after.json"
SCENE_PIXELS = 384  # drawn larger than the 96 that the model sees: pages scale pictures up
MEANINGS = {
    "right": "verified by the judge",
    "wrong": "false",
    "empty": "points at nothing visible",
    "missing": "not covered",
}
# Both sets have a contrast of at least 4.5 on their card, which hides the page's own colour.
STYLE = """
.card{fill:#fff;stroke:#d0d7de}.frame{fill:none;stroke:#8c959f}.plain,.name{fill:#57606a}.name{font-weight:600}.score{fill:#1f2328;font-weight:600}
.right{fill:#116329}.wrong{fill:#b42318;text-decoration:line-through}
.empty{fill:#7a3fc4;font-style:italic;text-decoration:underline}.missing{fill:#8a5300}
@media (prefers-color-scheme:dark){
.card{fill:#161b22;stroke:#3d444d}.plain,.name{fill:#a3adb8}.score{fill:#f0f3f6}
.right{fill:#56d364}.wrong{fill:#ff8e86}.empty{fill:#d2a8ff}.missing{fill:#e3b341}}
"""
FONT = "-apple-system,'Segoe UI',Helvetica,Arial,sans-serif"


def chosen(directory: str) -> dict:
    """What is kept of a run: the picture of the median change, both captions and the judge's answers about them."""
    run = load_run(directory)
    name, why = next(pair for pair in choose_images(run) if pair[1].startswith("median"))
    samples = run.path / "samples"
    lines = {}
    for label in ("sft", "rl"):
        found = [json.loads(line) for line in (samples / f"greedy-{label}.jsonl").read_text().splitlines()]
        lines[label] = next(line for line in found if line["id"] == name)
    _, split, index = name.split("-")
    settings = builder.make_config(seed=run.config["data"]["seed"]).settings
    return {
        "command": f"python -m balcap_jax.train --config=configs/scenes.py --workdir=RUN "
        f"--config.seed={run.config['seed']}",
        "versions": run.summary["versions"],
        "id": name,
        "chosen": why,
        "scene": builder.make_example(split, int(index), settings)["scene"],
        "reference_units": lines["rl"]["reference_units"],
        "before": _kept(lines["sft"]),
        "after": _kept(lines["rl"]),
    }


def _kept(line: dict) -> dict:
    caption = line["captions"][0]
    return {key: caption[key] for key in ("caption", "assertions", "covered", "b_capscore", "rewards")}


def marked(caption: str, assertions: list[dict]) -> list[tuple[str, str]]:
    """The caption's words in order, each with "right", "wrong", "empty" or "plain": the judge's word on its claim."""
    verdicts = {
        one["text"]: "empty" if not one["pointable"] else "right" if one["verified"] else "wrong" for one in assertions
    }
    words: list[tuple[str, str]] = []
    for sentence in re.findall(r"[^.]+\.?", caption):
        marks: dict[str, str] = {}
        for claim in parse(sentence).claims:
            verdict = verdicts[claim.text]
            for word in _words_of(claim, sentence):
                if marks.get(word) in (None, "right"):  # a word of two claims is as bad as the worse
                    marks[word] = verdict
        words += [(word, marks.get(word.lower().strip(".,"), "plain")) for word in sentence.split()]
    return words


def _words_of(claim: Claim, sentence: str) -> list[str]:
    """The words of a sentence that make one of its claims, in lower case."""
    if claim.kind in ("remark", "unparsable"):
        return [word.lower() for word in TOKEN.findall(sentence) if word.isalpha()]
    if claim.kind == "object":
        return list(claim.subject)
    if claim.kind == "relation":
        return [word for word in ("above", "below", "left", "right") if word in sentence.lower().split()]
    return claim.value.split() + (["shapes"] if claim.kind == "count" else [])


def missing(record: dict, side: str) -> str:
    """The reference units that a caption does not cover, as one line; "" where it covers all."""
    pairs = zip(record["reference_units"], record[side]["covered"], strict=True)
    return "; ".join(unit for unit, covered in pairs if not covered)


def _lines(words: list[tuple[str, str]], width: int) -> list[list[tuple[str, str]]]:
    """Words cut into lines of at most `width` characters."""
    lines, length = [[]], 0
    for word, mark in words:
        if length + len(word) > width and lines[-1]:
            lines.append([])
            length = 0
        lines[-1].append((word, mark))
        length += len(word) + 1
    return lines


def _text(x: float, y: float, words: list[tuple[str, str]]) -> str:
    """One line of text; neighbours of one mark are one span, so that a line through them has no gaps."""
    runs: list[list] = []
    for word, mark in words:
        if runs and runs[-1][1] == mark:
            runs[-1][0] += f" {word}"
        else:
            runs.append([word, mark])
    spans = " ".join(f'<tspan class="{mark}">{escape(text)}</tspan>' for text, mark in runs)
    return f'<text x="{x:g}" y="{y:g}">{spans}</text>'


def draw(record: dict, *, narrow: bool) -> str:
    """The SVG, with the scene beside the captions, or above them where it is narrow."""
    width, size, pad = (390, 16, 16) if narrow else (900, 15, 18)
    step = size * 1.45
    picture = 132 if narrow else 196
    left = pad if narrow else pad + picture + 24
    columns = 43 if narrow else 84
    y = pad + (picture + 10 if narrow else 0)
    body = []
    for side, title in (("before", "Before RL"), ("after", "After RL")):
        one = record[side]
        score = [("b-CapScore", "plain"), (f"{one['b_capscore']:.1f}", "score")]
        y += step
        body.append(_text(left, y, [(title, "name"), ("·", "plain"), *score]))
        for line in _lines(marked(one["caption"], one["assertions"]), columns):
            y += step
            body.append(_text(left, y, line))
        for line in textwrap.wrap(f"not covered: {missing(record, side)}", columns) if missing(record, side) else []:
            y += step
            body.append(_text(left, y, [(line, "missing")]))
        y += step * 0.55
    y += step * 0.8
    legend = [(MEANINGS[mark], mark) for mark in MEANINGS]
    for row in [legend[:2], legend[2:]] if narrow else [legend]:
        parts = [part for item in row for part in (item, ("·", "plain"))][:-1]
        body.append(_text(left, y, parts))
        y += step
    height = max(y - step + pad, picture + 2 * pad)
    top = pad if narrow else (height - picture) / 2
    x = (width - picture) / 2 if narrow else pad
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" '
        f'height="{height:.0f}" font-family="{FONT}" font-size="{size}" role="img">\n'
        f"<title>{escape(alternative(record))}</title>\n<style>{STYLE}</style>\n"
        f'<rect class="card" x=".5" y=".5" width="{width - 1}" height="{height - 1:.0f}" rx="10"/>\n'
        f'<image x="{x:g}" y="{top:.0f}" width="{picture}" height="{picture}" href="{_scene(record)}"/>\n'
        f'<rect class="frame" x="{x:g}" y="{top:.0f}" width="{picture}" height="{picture}"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def alternative(record: dict) -> str:
    """What the picture says, for those who do not see it."""
    said = {}
    for side in ("before", "after"):
        assertions = record[side]["assertions"]
        right = sum(one["verified"] and one["pointable"] for one in assertions)
        said[side] = f"{right} of {len(assertions)} assertions hold, b-CapScore {record[side]['b_capscore']:.1f}"
    return f"A rendered scene with its caption before RL ({said['before']}) and after RL ({said['after']})"


def _scene(record: dict) -> str:
    """The scene as a PNG in a data URL."""
    picture = Image.fromarray(render.render(Scene.from_json(record["scene"]), SCENE_PIXELS))
    file = io.BytesIO()
    picture.quantize(64, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def main() -> None:
    if len(sys.argv) > 1:
        RECORD.write_text(json.dumps(chosen(sys.argv[1]), indent=1) + "\n")
    record = json.loads(RECORD.read_text())
    for name, narrow in (("before_after.svg", False), ("before_after_narrow.svg", True)):
        (FIGURES / name).write_text(draw(record, narrow=narrow))


if __name__ == "__main__":
    main()
