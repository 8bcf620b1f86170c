"""Draws the pictures of the documentation as docs/figures/*.svg: `python docs/make/pictures.py`.

Each brings its own ground, so that it can be read on a light and on a dark page, and follows the reader's scheme.
"""

import html
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

FIGURES = Path(__file__).parents[1] / "figures"
LIGHT = {"ground": "#ffffff", "ink": "#1d2433", "soft": "#5a6478", "line": "#8a93a6", "wash": "#eef1f6"}
LIGHT |= {"blue": "#1f5fa8", "green": "#1d7a4c", "orange": "#b3541e", "paper": "#ffffff"}
DARK = {"ground": "#1b2130", "ink": "#e8ebf2", "soft": "#b3bccd", "line": "#77829a", "wash": "#2a3244"}
DARK |= {"blue": "#4d8fdc", "green": "#3aa873", "orange": "#d97a3f", "paper": "#10141e"}
COLOURS = ("blue", "green", "orange")

# One group of four captions: precision, recall, language. A and B have the same sum, D and B the same precision.
GROUP = {"A": (0.96, 0.40, 0.8), "B": (0.90, 0.46, 0.8), "C": (0.90, 0.70, 0.8), "D": (0.90, 0.20, 0.8)}
OBJECTIVES = ("precision", "recall", "language")
EPS = 1e-4
# Tokens of the eight responses of the picture of packing, and the tokens that a row may have.
LENGTHS, LONGEST = (30, 44, 20, 96, 38, 26, 52, 34), 96
PROMPT, RESPONSE, SAMPLES = 512, 256, 8
LOW, HIGH = 0.5, 2.0


class Drawing:
    """Shapes and words on a ground of `width` x `height`; `title` says what they show to those who cannot see them."""

    def __init__(self, width: int, height: int, title: str):
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def rect(self, x: float, y: float, w: float, h: float, fill: str = "wash", line: str = "", radius: int = 6) -> None:
        stroke = f' stroke="var(--{line})"' if line else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius}" fill="var(--{fill})"{stroke}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: int = 14,
        fill: str = "ink",
        at: str = "start",
        is_head: bool = False,
    ) -> None:
        bold = ' font-weight="600"' if size >= 15 or is_head else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="var(--{fill})" text-anchor="{at}"{bold}>'
            f"{html.escape(words)}</text>"
        )

    def line(self, *points: tuple[float, float], fill: str = "line", arrow: bool = False, dashed: bool = False) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        end = ' marker-end="url(#end)"' if arrow else ""
        dash = ' stroke-dasharray="4 4"' if dashed else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="var(--{fill})" stroke-width="2"{dash}{end}/>')

    def box(self, x: float, y: float, w: float, h: float, head: str, *lines: str, fill: str = "wash") -> None:
        """A box with a head and smaller lines below it."""
        self.rect(x, y, w, h, fill, "line")
        self.text(x + 12, y + 24, head, is_head=True)
        for k, words in enumerate(lines):
            self.text(x + 12, y + 46 + 19 * k, words, size=13, fill="soft")

    def svg(self) -> str:
        def variables(colours: dict[str, str]) -> str:
            return "".join(f"--{name}:{value};" for name, value in colours.items())

        style = (
            f"svg{{{variables(LIGHT)}font-family:system-ui,sans-serif}}"
            f"@media(prefers-color-scheme:dark){{svg{{{variables(DARK)}}}}}"
        )
        arrow = (
            '<marker id="end" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0L10 5L0 10z" fill="var(--line)"/></marker>'
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img"><title>{html.escape(self.title)}</title><style>{style}</style>'
            f'<defs>{arrow}</defs><rect width="{self.width}" height="{self.height}" rx="10" fill="var(--ground)"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def step() -> Drawing:
    d = Drawing(780, 330, "One RL step: data, rollout, judge, update, and what comes out of it")
    d.box(20, 30, 130, 96, "data", "B pictures", "with prompts", "[B, P]")
    rollout = "encode each picture once", "prefill each prompt once", "decode G captions", "[B, G, R]"
    d.box(190, 30, 196, 134, "rollout", *rollout)
    d.box(426, 30, 150, 96, "judge", "scores or nothing", "rewards [B, G, K]", "valid [B, G, K]")
    update = "length gate", "advantages", "log-probabilities", "loss, gradient", "AdamW"
    d.box(616, 30, 150, 153, "update", *update, fill="paper")
    for start, end in ((150, 188), (386, 424), (576, 614)):
        d.line((start, 78), (end, 78), arrow=True)
    d.line((285, 164), (285, 226), (596, 226), (596, 166), (614, 166), arrow=True)
    d.text(298, 217, "tokens, log-probabilities, image features", size=13, fill="soft")
    d.line((691, 183), (691, 276), (90, 276), (90, 128), arrow=True)
    d.text(104, 267, "new parameters", size=13, fill="soft")
    note = "rollout and update are one compiled program each; the judge runs on the host"
    d.text(104, 306, note, size=13, fill="soft")
    return d


def positions() -> tuple[int, int]:
    """Positions that an update computes for one prompt: with the prompt repeated, and with it shared."""
    return SAMPLES * (PROMPT + RESPONSE), PROMPT + SAMPLES * RESPONSE


def prefix() -> Drawing:
    d = Drawing(780, 310, "The prompt repeated for each sample, against one prefix that all samples share")
    repeated, shared = positions()
    scale, top = 0.36, 74
    for x, head, words in (
        (20, "repeated", f"{SAMPLES} x ({PROMPT} + {RESPONSE}) = {repeated:,} positions"),
        (430, "shared", f"{PROMPT} + {SAMPLES} x {RESPONSE} = {shared:,} positions, {shared / repeated:.2f} of it"),
    ):
        d.text(x, 34, head, size=16)
        d.text(x, 56, words, size=13, fill="soft")
    for g in range(SAMPLES):
        y = top + 25 * g
        d.rect(20, y, PROMPT * scale, 18, "blue", radius=3)
        d.rect(24 + PROMPT * scale, y, RESPONSE * scale, 18, "orange", radius=3)
        d.rect(434 + PROMPT * scale, y, RESPONSE * scale, 18, "orange", radius=3)
    d.rect(430, top, PROMPT * scale, 25 * SAMPLES - 7, "blue", radius=3)
    for x, fill, words in (
        (20, "blue", f"picture and prompt, P = {PROMPT}"),
        (300, "orange", f"response, R = {RESPONSE}"),
    ):
        d.rect(x, 286, 12, 12, fill, radius=2)
        d.text(x + 20, 297, words, size=13, fill="soft")
    d.text(500, 297, "keys and values of P: once", size=13, fill="soft")
    return d


def useful() -> tuple[float, float]:
    """Shares of computed positions that hold a token: padded to the longest, and packed in rows of LONGEST."""
    return sum(LENGTHS) / (len(LENGTHS) * LONGEST), sum(LENGTHS) / (len(packed()) * LONGEST)


def packed() -> list[list[int]]:
    """Rows of LONGEST tokens that hold the responses end to end."""
    rows, room = [[]], LONGEST
    for length in LENGTHS:
        while length:
            part = min(length, room)
            rows[-1].append(part)
            length, room = length - part, room - part
            if not room:
                rows, room = [*rows, []], LONGEST
    return [row for row in rows if row]


def packing() -> Drawing:
    d = Drawing(780, 300, "Responses of uneven lengths, padded to the longest and packed end to end")
    padded, dense = useful()
    scale, top = 3.4, 74
    for x, head, words in (
        (20, "padded", f"{len(LENGTHS)} rows, {100 * padded:.0f}% of the positions hold a token"),
        (420, "packed", f"{len(packed())} rows, {100 * dense:.0f}% of the positions hold a token"),
    ):
        d.text(x, 34, head, size=16)
        d.text(x, 56, words, size=13, fill="soft")
    for k, length in enumerate(LENGTHS):
        y = top + 25 * k
        d.rect(20, y, LONGEST * scale, 18, "wash", "line", radius=2)
        d.rect(20, y, length * scale, 18, COLOURS[k % 3], radius=2)
    which, left = 0, LENGTHS[0]
    for k, row in enumerate(packed()):
        x, y = 420.0, top + 25 * k
        d.rect(x, y, LONGEST * scale, 18, "wash", "line", radius=2)
        for part in row:
            d.rect(x, y, part * scale - 1, 18, COLOURS[which % 3], radius=2)
            x, left = x + part * scale, left - part
            if not left and which + 1 < len(LENGTHS):
                which, left = which + 1, LENGTHS[which + 1]
    d.text(420, 212, "Units are 32 tokens in the code, and a bucket", size=13, fill="soft")
    d.text(420, 232, "says how many rows are computed.", size=13, fill="soft")
    return d


def gate() -> Drawing:
    d = Drawing(780, 250, "The length gate: the language reward is kept inside the band and 0 outside")
    left, right, bottom = 60, 740, 190

    def at(ratio: float) -> float:
        return left + (right - left) * ratio / 3

    d.text(20, 32, "language reward of a caption, by its length over that of the reference", size=15)
    d.rect(at(LOW), 60, at(HIGH) - at(LOW), bottom - 60, "wash", radius=0)
    d.text((at(LOW) + at(HIGH)) / 2, 54, "kept", size=14, fill="green", at="middle")
    d.text((left + at(LOW)) / 2, 54, "0", size=14, fill="orange", at="middle")
    d.text((at(HIGH) + right) / 2, 54, "0", size=14, fill="orange", at="middle")
    d.line((left, bottom), (at(LOW), bottom), fill="orange")
    d.line((at(LOW), bottom), (at(LOW), 80), fill="line", dashed=True)
    d.line((at(LOW), 80), (at(HIGH), 80), fill="green")
    d.line((at(HIGH), 80), (at(HIGH), bottom), fill="line", dashed=True)
    d.line((at(HIGH), bottom), (right, bottom), fill="orange")
    d.text(left - 8, 85, "1", size=13, fill="soft", at="end")
    d.text(left - 8, bottom + 5, "0", size=13, fill="soft", at="end")
    for ratio in (0, LOW, 1, HIGH, 3):
        d.text(at(ratio), bottom + 22, f"{ratio:g}", size=13, fill="soft", at="middle")
    d.text(
        right,
        bottom + 44,
        "words of the caption / words of the reference; both bounds belong to the band",
        size=13,
        fill="soft",
        at="end",
    )
    return d


def z_scores() -> dict[str, list[float]]:
    """The z-score of each caption in each objective."""
    columns = []
    for column in zip(*GROUP.values(), strict=True):
        mean, std = statistics.fmean(column), statistics.stdev(column)
        columns.append([(value - mean) / (std + EPS) if std > 1e-9 else 0.0 for value in column])
    return dict(zip(GROUP, map(list, zip(*columns, strict=True)), strict=True))


def grpo() -> dict[str, float]:
    """The advantage of each caption where rewards are added first."""
    sums = [round(sum(scores), 9) for scores in GROUP.values()]
    mean, std = statistics.fmean(sums), statistics.stdev(sums)
    return {name: (total - mean) / (std + EPS) for name, total in zip(GROUP, sums, strict=True)}


def c_gdpo() -> Drawing:
    d = Drawing(780, 390, "c-GDPO against GRPO on one group of four captions")
    d.text(20, 32, "scores of one group", size=15)
    d.text(285, 32, "z-score of each objective", size=15)
    d.text(560, 32, "advantage", size=15)
    for k, name in enumerate(OBJECTIVES):
        d.text(60 + 66 * k, 58, name, size=13, fill=COLOURS[k])
    d.text(560, 58, "GRPO", size=13, fill="soft")
    d.text(670, 58, "c-GDPO", size=13, fill="soft")
    scores, alone = z_scores(), grpo()
    for row, (name, values) in enumerate(GROUP.items()):
        y = 90 + 64 * row
        d.text(24, y + 16, name, size=16)
        for k, value in enumerate(values):
            d.text(60 + 66 * k, y + 16, f"{value:.2f}", size=14)
        for k, z in enumerate(scores[name]):
            start = min(0.0, z) * 55
            d.rect(385 + start, y - 12 + 15 * k, max(abs(z) * 55, 2), 11, COLOURS[k], radius=2)
        for x, value in ((560, alone[name]), (670, sum(scores[name]))):
            d.text(x, y + 16, f"{value:+.2f}", size=16)
    d.line((385, 70), (385, 330), fill="line")
    d.text(
        20,
        352,
        "A and B have one sum, so GRPO cannot tell them apart. A is the only precise one, and c-GDPO says so.",
        size=13,
        fill="soft",
    )
    d.text(
        20,
        374,
        "Language is the same for all: it adds exactly 0. c-GDPO then normalises once more over the batch.",
        size=13,
        fill="soft",
    )
    return d


def mesh() -> Drawing:
    d = Drawing(780, 330, "Eight devices while training and while sampling")
    for x, head, words in (
        (20, "training: fsdp 8", "each device: 1/8 of every matrix, 1/8 of the prompts"),
        (410, "sampling: matrices over 2", "each pair: all of the matrices, 1/4 of the prompts"),
    ):
        d.text(x, 34, head, size=16)
        d.text(x, 56, words, size=13, fill="soft")
    for k in range(8):
        for x, parts, part, groups, group in ((20, 8, k, 8, k), (410, 2, k % 2, 4, k // 2)):
            left, top = x + 86 * (k % 4), 76 + 104 * (k // 4)
            d.rect(left, top, 78, 92, "paper", "line")
            d.text(left + 39, top + 17, f"device {k}", size=12, fill="soft", at="middle")
            d.rect(left + 8, top + 24, 62, 24, "wash", "line", radius=2)
            d.rect(left + 8 + 62 / parts * part, top + 24, 62 / parts, 24, "blue", radius=2)
            d.rect(left + 8, top + 58, 62, 24, "wash", "line", radius=2)
            d.rect(left + 8 + 62 / groups * group, top + 58, 62 / groups, 24, "orange", radius=2)
    d.rect(20, 296, 12, 12, "blue", radius=2)
    d.text(40, 307, "its part of each matrix", size=13, fill="soft")
    d.rect(210, 296, 12, 12, "orange", radius=2)
    d.text(230, 307, "its prompts, with all G samples of each", size=13, fill="soft")
    d.text(510, 307, "laid out anew once for each rollout", size=13, fill="soft")
    return d


PICTURES = {"step": step, "prefix": prefix, "packing": packing, "gate": gate, "c_gdpo": c_gdpo, "mesh": mesh}


def main(names: Sequence[str]) -> None:
    for name in names or PICTURES:
        (FIGURES / f"{name}.svg").write_text(PICTURES[name]().svg())


if __name__ == "__main__":
    main(sys.argv[1:])
