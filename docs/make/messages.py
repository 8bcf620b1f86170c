"""A hook of MkDocs: the page of messages gets all of them, read from the code as they stand there.

A message is the text of a UserError, a problem that a config field has, or an argument that a command refuses.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[2] / "balcap_jax"
HOLE = "…"
"""Stands for what a message fills in: a path, a value, a number."""
MARKER = "<!-- all messages -->"
_LEAST = 12  # characters that a message says of itself


class Message(NamedTuple):
    file: str
    text: str


def messages() -> list[Message]:
    """All of them, by file in alphabetical order and in the order of its lines."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE.parent).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            for text in _texts(node):
                if len(text.replace(HOLE, "")) >= _LEAST:
                    found.append((name, node.lineno, text))
    return list(dict.fromkeys(Message(name, text) for name, _, text in sorted(found)))


def _texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Call) and node.args:
        called = node.func
        name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
        if name in ("UserError", "NoScore") or (name == "error" and getattr(called.value, "id", "") == "parser"):
            yield " ".join(_text(node.args[0]).split())
    if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
        field, problem = map(_text, node.value.elts)
        if "." in field and "balcap_jax" not in field and " " in problem:
            yield f"config field '{field}' {' '.join(problem.split())}"


def _text(node: ast.AST) -> str:
    """The text of an expression, with a HOLE for each part that is not written there."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return HOLE


def listing() -> str:
    """A heading for each part of the package, and below it its messages."""
    lines, part = [], None
    for file, text in messages():
        own = file.split("/")[1].removesuffix(".py")
        if own != part:
            lines += ["", f"### {own}", ""]
            part = own
        ticks = "``" if "`" in text else "`"
        lines.append(f"- {ticks} {text} {ticks}" if "`" in text else f"- `{text}`")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: object) -> str:
    return markdown.replace(MARKER, listing()) if MARKER in markdown else markdown
