"""Pages and pictures that are made from the code are what it makes now, and say what is so."""

import ast
import importlib.util
import re
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from balcap_jax import advantages
from balcap_jax.config.outputs import OUTPUTS, text
from balcap_jax.config.schema import FIELDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def made(name: str):
    """A module of docs/make."""
    spec = importlib.util.spec_from_file_location(f"make_{name}", DOCS / "make" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_of_this_code():
    pages = made("pages")
    for name, make in pages.PAGES.items():
        assert (DOCS / name).read_text() == make(), f"docs/{name} is stale: python docs/make/pages.py writes it"


def test_every_field_and_key_has_its_row():
    rows = (DOCS / "configs.md").read_text()
    for name, field in FIELDS.items():
        assert rows.count(f"| `{name}` |") == 1
        assert field.meaning[:20].replace("|", "\\|").split("*")[0].split("<")[0].split("[")[0] in rows
    rows = (DOCS / "outputs.md").read_text()
    for output in OUTPUTS:
        assert f"## {output.path}\n" in rows
        for key in output.keys:
            assert f"| `{key.name}` | {key.kind} |" in rows
            assert key.name in text()


def test_no_key_stands_twice():
    for output in OUTPUTS:
        names = [key.name for key in output.keys]
        assert len(set(names)) == len(names)


def test_every_key_is_a_name_in_the_code():
    """The other way round than `output_keys`: what nobody writes any more has no row."""
    literals = set()
    for path in (ROOT / "balcap_jax").rglob("*.py"):
        if path.name != "outputs.py":
            nodes = ast.walk(ast.parse(path.read_text()))
            for node in nodes:
                literals |= {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()
                literals |= {node.arg} if isinstance(node, ast.keyword) else set()
                # Fields of named tuples and of data classes that are written as they are.
                literals |= (
                    {node.target.id} if isinstance(node, ast.AnnAssign) and hasattr(node.target, "id") else set()
                )
    gone = []
    for output in OUTPUTS:
        for key in output.keys:
            whole = re.sub("<[a-z]+>.*", "", key.name)
            last = re.split(r"\.|\[\]|/", key.name)[-1]
            parts = [part for part in (whole, whole.rstrip("/"), whole.rstrip("."), last) if part]
            fixed = "<" not in last
            if not any(part in literals for part in parts) and (fixed or "." not in key.name):
                gone.append(f"{output.path}: {key.name}")
    assert gone == []


# ---- pictures


def test_pictures_are_of_this_script():
    pictures = made("pictures")
    for name, make in pictures.PICTURES.items():
        assert (DOCS / "figures" / f"{name}.svg").read_text() == make().svg(), "python docs/make/pictures.py"


@pytest.mark.parametrize("name", ["step", "prefix", "packing", "gate", "c_gdpo", "mesh"])
def test_a_picture_keeps_its_words_inside_and_is_shown(name):
    root = xml.etree.ElementTree.fromstring((DOCS / "figures" / f"{name}.svg").read_text())
    width = float(root.get("width"))
    words = [one for one in root.iter() if one.tag.endswith("text")]
    assert words
    for one in words:
        # A wide font has 0.56 of its size for a character of prose.
        long, x = 0.56 * float(one.get("font-size")) * len(one.text), float(one.get("x"))
        left = {"start": x, "middle": x - long / 2, "end": x - long}[one.get("text-anchor")]
        assert left >= 0, one.text
        assert left + long <= width, one.text
    assert any(f"figures/{name}.svg" in page.read_text() for page in DOCS.glob("*.md"))


def test_the_pictures_numbers_are_those_of_the_method():
    pictures = made("pictures")
    rewards = np.array([list(pictures.GROUP.values())], np.float32)
    options = {"weights": np.ones(3, np.float32), "batch_norm": "none"}
    ours = advantages.compute(rewards, **options)
    np.testing.assert_allclose(ours.per_objective[0], list(pictures.z_scores().values()), atol=2e-4)
    assert not np.any(ours.per_objective[..., 2])
    summed = advantages.compute(rewards, estimator="grpo", **options)
    np.testing.assert_allclose(summed.combined[0], list(pictures.grpo().values()), atol=2e-4)
    picture = pictures.c_gdpo().svg()
    for value in (*np.asarray(ours.combined[0]), *np.asarray(summed.combined[0])):
        assert f">{value:+.2f}<" in picture

    words = np.array([[10, 9, 40, 41]])
    kept = advantages.length_gate(words, np.array([20]), pictures.LOW, pictures.HIGH)
    assert kept.tolist() == [[1, 0, 1, 0]]
    assert (FIELDS["rewards.gate_low"].default, FIELDS["rewards.gate_high"].default) == (pictures.LOW, pictures.HIGH)

    repeated, shared = pictures.positions()
    assert (repeated, shared) == (6144, 2560)
    padded, dense = pictures.useful()
    assert (round(padded, 2), round(dense, 2)) == (0.44, 0.89)
    assert [sum(row) for row in pictures.packed()] == [96, 96, 96, 52]


# ---- messages


def _texts() -> list[str]:
    """All texts of the package, with a hole for what they fill in."""
    messages = made("messages")
    texts = [message.text for message in messages.messages()]
    for path in messages.PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                texts.append(" ".join(messages._text(node).split()))
    return texts


def test_troubleshooting_quotes_what_commands_say():
    quoted = re.findall(r"\*\*`([^`]+)`\*\*", (DOCS / "troubleshooting.md").read_text())
    assert len(quoted) > 50
    texts = _texts()
    for message in quoted:
        parts = [part.strip() for part in message.split("…") if len(part.strip()) > 3]
        assert parts
        assert any(re.search(".*".join(map(re.escape, parts)), one, re.DOTALL) for one in texts), message


def test_the_list_has_the_messages_of_the_code():
    messages = made("messages")
    found = {message.text for message in messages.messages()}
    assert len(found) > 350
    assert "another process is training in …; choose another --workdir" in found
    assert "config field 'judge.votes' must be odd, so that there is a majority, got …" in found
    assert "--suite=… needs --data=DIR" in found
    page = (DOCS / "troubleshooting.md").read_text()
    shown = messages.on_page_markdown(page)
    assert messages.MARKER in page
    assert messages.MARKER not in shown
    assert all(text in shown for text in found)
