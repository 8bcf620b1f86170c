"""Holds what runs and evaluations write against `balcap_jax.config.outputs`, in every test that makes one."""

import functools
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from balcap_jax.config.outputs import OUTPUTS, Key

KEYS = {output.path: output.keys for output in OUTPUTS}
_PLACEHOLDER = re.compile("<[a-z_]+>")
_KINDS = {"int": int, "float": int | float, "bool": bool, "str": str, "list": list, "object": dict, "null": type(None)}


def problems(path: str, record: Mapping[str, Any]) -> list[str]:
    """What a line, or a file, of the output `path` has that OUTPUTS does not say: keys, and values of another kind."""
    found = []
    for place, value in _places(record):
        keys = [key for key in KEYS[path] if _leads_to(key, place, value)]
        name = ".".join(place).replace(".[]", "[]")
        if not keys:
            found.append(f"{name} = {value!r} is a key that balcap_jax/config/outputs.py does not have")
        elif not any(_fits(key, place, value) for key in keys):
            found.append(f"{name} = {value!r} is no {keys[0].kind}, as balcap_jax/config/outputs.py has it")
    return list(dict.fromkeys(found))


def parts_of(key: Key) -> list[str]:
    return key.name.replace("[]", ".[]").split(".")


def _leads_to(key: Key, place: tuple[str, ...], value: Any) -> bool:
    """Whether the key is at this place, above it and open, or below it where nothing is there (an empty list)."""
    parts = parts_of(key)
    if len(place) > len(parts) and not key.kind.startswith("object"):
        return False
    if len(place) < len(parts) and value not in ({}, []):
        return False
    return all(_is(part, name) for part, name in zip(parts, place, strict=False))


def _is(part: str, name: str) -> bool:
    return re.fullmatch(".+".join(map(re.escape, _PLACEHOLDER.split(part))), name, re.DOTALL) is not None


def _fits(key: Key, place: tuple[str, ...], value: Any) -> bool:
    if len(place) != len(parts_of(key)):
        return True
    kinds = key.kind.split(" or ")
    return any(isinstance(value, _KINDS[kind]) and isinstance(value, bool) == (kind == "bool") for kind in kinds)


def _places(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of what is no object with entries; lists of objects are entered, other lists are not."""
    if isinstance(value, Mapping) and value:
        for name, entry in value.items():
            yield from _places(entry, (*place, str(name)))
    elif isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        for entry in value:
            yield from _places(entry, (*place, "[]"))
    else:
        yield place, value


def records(path: Path) -> Iterator[Mapping[str, Any]]:
    """The lines of a JSONL file, or the one object of another; nothing where it is missing."""
    if path.exists():
        text = path.read_text()
        yield from map(json.loads, text.splitlines() if path.suffix == ".jsonl" else [text])


def of_run(workdir: Path, own: bool = False) -> list[str]:
    """The problems of all files of a workdir; `own`: captions may have keys of a user's own reward."""
    found = []
    for path in KEYS:
        if path.startswith("WORKDIR/"):
            for file in sorted(workdir.glob(path.removeprefix("WORKDIR/"))):
                for record in records(file):
                    found += [f"{file}: {problem}" for problem in problems(path, record)]
    return [problem for problem in found if not (own and ": captions[]." in problem)]


def watch() -> None:
    """From now on every run, and every evaluation of the command, that ends well is looked at."""
    if run := sys.modules.get("balcap_jax.training.run"):
        leave = run.Run.__exit__

        @functools.wraps(leave)
        def look_and_leave(self, *error):
            if self.leads and not any(error):
                found = of_run(self.workdir, own=":" in self.config.rewards.name)
                assert not found, "\n".join(found[:20])
            return leave(self, *error)

        run.Run.__exit__ = look_and_leave
    if evaluate := sys.modules.get("balcap_jax.evaluate"):
        score = evaluate.evaluate

        @functools.wraps(score)
        def score_and_look(metric, items, out, *rest, **options):
            results = score(metric, items, out, *rest, **options)
            found = []
            for name in ("results.json", "items.jsonl"):
                found += [problem for record in records(out / name) for problem in problems(f"DIR/{name}", record)]
            assert not found, "\n".join(found[:20])
            return results

        evaluate.evaluate = score_and_look
