"""Writes docs/configs.md and docs/outputs.md from the code: `python docs/make/pages.py`; `--check` only looks."""

import sys
from pathlib import Path
from typing import Any

from balcap_jax.config.outputs import OUTPUTS
from balcap_jax.config.schema import FIELDS, KINDS, Setting

DOCS = Path(__file__).parents[1]
_NOTE = "<!-- Written by `python docs/make/pages.py`; edit the code that it reads. -->\n"
_TYPES = {"ints": "int, ...", "floats": "float, ...", "int or auto": "int or `auto`"}
_ABOUT = {
    "": "The run itself.",
    "model": "Architecture and sizes of the policy, for random initialisation. A saved model brings its own sizes.",
    "lora": "Adapters in place of all parameters, see [the method](method.md#our-choices).",
    "data": "The data set, see [data](data.md).",
    "stages": "Which stages run, and how each trains.",
    "rollout": "Sampling, see [performance](performance.md#sampling-in-the-memory-that-is-there).",
    "pipeline": "Judging beside the next rollout, see [judges](judges.md#judging-beside-the-next-rollout).",
    "rewards": "Objectives and their weights, see [the method](method.md#rewards).",
    "judge": "Who scores captions, see [judges](judges.md).",
    "advantage": "From rewards to advantages, see [c-GDPO](method.md#from-rewards-to-an-advantage-c-gdpo).",
    "loss": "The update's loss, see [the loss](method.md#the-loss).",
    "optim": "AdamW.",
    "mesh": "How devices are used, see [pods](pods.md).",
    "checkpoint": "What is saved, and when.",
    "log": "What is logged, and evaluations.",
}


def code(text: Any) -> str:
    return f"`{text}`"


def shown(value: Any) -> str:
    """A default, as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def allowed(field: Setting) -> str:
    """The range of a field, or its choices."""
    if field.kind == "bool":
        return "`True`, `False`"
    if field.choices:
        return ", ".join(map(code, field.choices))
    return field.range_text.replace(" | ", " or ") or "text"


def configs() -> str:
    by_group: dict[str, list[Setting]] = {}
    for name, field in FIELDS.items():
        by_group.setdefault(name.rpartition(".")[0], []).append(field)
    lines = [
        "# Config fields",
        "",
        _NOTE,
        f"All {len(FIELDS)} fields of a run. A recipe sets some, and `--config.FIELD=VALUE` any of them:",
        "",
        "```bash",
        "balcap config                                     # this table in the terminal",
        "balcap config --config=scenes --config.seed=1     # the values of a run",
        "```",
        "",
        "An unknown field is answered with the nearest name, a value out of its range with the range. Several numbers",
        "are written with commas: `--config.rollout.buckets=64,96`. Fields marked ↻ may change when a run is resumed.",
        "",
        "| type | value |",
        "|---|---|",
        *(f"| {_TYPES.get(kind, kind)} | {text} |" for kind, text in KINDS.items()),
    ]
    top = ""
    for group, fields in by_group.items():
        head = group.partition(".")[0]
        if head != top or not group:
            lines += ["", f"## {head or 'Run'}", "", _ABOUT[head]]
            top = head
        if "." in group:
            lines += ["", f"### {group}"]
        lines += ["", "| field | type | default | range | meaning |", "|---|---|---|---|---|"]
        for field in fields:
            default = shown(field.default)
            cells = (
                code(field.name),
                _TYPES.get(field.kind, field.kind),
                code(default) if default else "empty",
                allowed(field),
                escaped(field.meaning) + (" ↻" if field.resumable else ""),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Plain text for a cell of a table."""
    for mark in "\\|<*[":
        text = text.replace(mark, f"\\{mark}")
    return text


def outputs() -> str:
    lines = [
        "# Output files",
        "",
        _NOTE,
        "The keys of every file of numbers that a command writes; `balcap config --outputs` prints them.",
        "`<objective>` stands for the name of an objective, such as `precision`; other names in brackets likewise. A",
        "dot is an object inside another, `[]` each entry of a list. A run's other files: `config.json` holds its",
        "settings, `model/` and `best/` are Hugging Face directories, `checkpoints/` are Orbax's.",
        "",
        "Rewards, shares and rates lie in 0 to 1, b-CapScore and metrics in 0 to 100. Times are seconds. Lengths are",
        "words, unless a key says tokens.",
    ]
    for output in OUTPUTS:
        commands = " and ".join(code(name) for name in output.command.split(", "))
        lines += ["", f"## {output.path}", "", f"By {commands}: {output.about}."]
        lines += ["", "| key | type | meaning | there |", "|---|---|---|---|"]
        for key in output.keys:
            cells = code(key.name), key.kind, escaped(key.meaning), escaped(key.when) or "always"
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


PAGES = {"configs.md": configs, "outputs.md": outputs}


def main() -> None:
    stale = [name for name, make in PAGES.items() if (DOCS / name).read_text() != make()]
    if "--check" in sys.argv:
        sys.exit(f"stale: {', '.join(stale)}; run `python docs/make/pages.py`" if stale else 0)
    for name in stale:
        (DOCS / name).write_text(PAGES[name]())
        print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
