"""What the documentation names is there: commands with their options, fields, keys of output files, paths, headings."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import output_keys
import pytest

from balcap_jax import rewards
from balcap_jax.cli.errors import UserError
from balcap_jax.config import recipes
from balcap_jax.config.schema import FIELDS
from balcap_jax.rewards.base import Samples

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
GROUPS = {name.rsplit(".", depth)[0] for name in FIELDS for depth in range(1, name.count(".") + 1)}
_FILE = re.compile(r"\.(py|sh|md|json|jsonl|html|conf|svg|yml|toml)$")
_PLACE = re.compile(r"(?<![\w/.:<-])(?:[\w.-]+/)+[\w.-]+\.(?:py|sh|md|svg|j2|yml|toml)\b")
_FOLDERS = (ROOT, ROOT / "balcap_jax", ROOT / "docs", ROOT / "configs")
# Files of other projects, or of the reader.
_FOREIGN = re.compile(r"^(tasks|dataset|eval|api|utils|dir|a|package|models/balcap|bin|cloud|LLAMA|PEERS|\.venv)/")


def blocks(text: str) -> str:
    """The fenced blocks that a shell reads, with continued lines joined."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "\n".join(block for kind, block in found if kind in ("", "bash")).replace("\\\n", " ")


def inline(text: str) -> list[str]:
    """The code spans outside blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def commands(text: str) -> list[list[str]]:
    """Words of each command of ours, from blocks and from code spans."""
    lines = [*blocks(text).splitlines(), *inline(text)]
    found = []
    for line in lines:
        line = re.sub(r"(?<![\w-])balcap (?=[a-z]+ --)", "python -m balcap_jax.", line)
        for start in re.finditer(r"python -m balcap_jax\.\w|python benchmarks/|(?:bash |sbatch )?launch/\S+\.sh", line):
            words = re.sub(r"\s#.*|\.\.\.|[\"']", " ", line[start.start() :]).split()
            found.append(words[: words.index("|")] if "|" in words else words)
    return found


COMMANDS = [(page, words) for page, text in PAGES.items() for words in commands(text)]


@pytest.fixture(scope="module")
def help_of():
    """The text of a command's --help, asked once."""
    texts: dict[str, str] = {}

    def ask(module: str, capsys) -> str:
        if module not in texts:
            name = f"balcap_jax.{module}"
            if (ROOT / "balcap_jax" / module).is_dir():
                name += ".__main__"
            with pytest.raises(SystemExit) as end:
                importlib.import_module(name).main(["--help"])
            assert end.value.code == 0
            texts[module] = capsys.readouterr().out
        return texts[module]

    return ask


def test_commands_and_their_options_are_there(help_of, capsys):
    assert len(COMMANDS) > 60
    wrong = []
    for page, words in COMMANDS:
        options = {word.partition("=")[0] for word in words if word.startswith("--") and len(word) > 2}
        known = {option for option in options if re.match(r"--(config|judge)\.", option)}
        for option in known:
            name = option.removeprefix("--").removeprefix("config.")
            if name not in FIELDS and not re.search("FIELD", name):
                wrong.append(f"{page}: {' '.join(words)}: no field {name}")
        if words[:2] == ["python", "-m"]:
            listed = help_of(words[2].removeprefix("balcap_jax."), capsys)
        else:
            script = ROOT / next(word for word in words if _FILE.search(word))
            listed = script.read_text() if script.is_file() else ""
            # A script hands on what it does not know to the command that it starts.
            listed += help_of("train", capsys) if script.suffix == ".sh" else ""
        for option in options - known:
            if not re.search(rf"{re.escape(option)}\b", listed) and option[2:] not in re.findall(
                r"\"([\w-]+)\"", listed
            ):
                wrong.append(f"{page}: {' '.join(words)}: no option {option}")
    assert wrong == []


def test_recipes_and_variants_are_there():
    named = {
        (page, word.partition("=")[2] if "=" in word else word)
        for page, text in PAGES.items()
        for word in re.findall(r"(?:--config=)?configs/(?!vlm|RECIPE)\w+\.py(?::[\w,]+)?", text)
    }
    named |= {
        (page, f"configs/{name}.py{variant}")
        for page, text in PAGES.items()
        for name, variant in re.findall(r"--config=([a-z]\w+)((?::[\w,]+)?)(?![\w./:-])", text)
    }
    assert len(named) > 15
    for page, recipe in sorted(named):
        try:
            recipes.load(str(ROOT / recipe.partition(".py")[0]) + ".py" + recipe.partition(".py")[2])
        except UserError as error:
            pytest.fail(f"{page} names {recipe}: {error}")


def test_variants_that_are_named_alone_are_of_a_recipe():
    named = {
        (page, span) for page, text in PAGES.items() for span in inline(text) if re.fullmatch(r":[a-z_0-9,]+", span)
    }
    assert len(named) > 20
    wrong = []
    for page, variant in sorted(named):
        for recipe in ("scenes", "qwen25vl_3b", "photos"):
            try:
                recipes.load(f"{ROOT}/configs/{recipe}.py{variant}")
                break
            except UserError:
                continue
        else:
            wrong.append(f"{page}: {variant}")
    assert wrong == []


def test_fields_are_there():
    wrong, count = [], 0
    for page, text in PAGES.items():
        for span in inline(text):
            name = re.split(r"[= ]", span.removeprefix("--config."))[0]
            head = name.partition(".")[0]
            if "." not in name or head not in GROUPS or _FILE.search(name) or not re.fullmatch(r"[\w.*]+", name):
                continue
            if (ROOT / "balcap_jax" / f"{name.replace('.', '/')}.py").is_file():
                continue  # a module
            count += 1
            if name not in FIELDS and name not in GROUPS and name.removesuffix(".*") not in GROUPS:
                wrong.append(f"{page}: {span}")
    assert count > 150
    assert wrong == []


def test_keys_of_output_files_are_there():
    keys = [key.name for key in output_keys.KEYS["WORKDIR/metrics.jsonl"]]
    heads = {name.partition("/")[0] for name in keys if "/" in name} - {"judge", "best"}
    heads |= {"judge/", "best/"}
    wrong, count = [], 0
    for page, text in PAGES.items():
        for span in inline(text):
            if not re.fullmatch(r"[a-z_]+/[a-z_]+(/[a-z_]+)?", span) or not span.startswith(tuple(heads)):
                continue
            if (ROOT / "balcap_jax" / span).exists() or span.startswith(("data/", "models/")):
                continue
            count += 1
            if output_keys.problems("WORKDIR/metrics.jsonl", {span: None}) and not _is_key(span, keys):
                wrong.append(f"{page}: {span}")
    assert count > 15
    assert wrong == []


def _is_key(span: str, keys: list[str]) -> bool:
    return any(re.fullmatch(re.sub("<[a-z]+>", "[^/]+", key), span) for key in keys)


def test_paths_are_there():
    wrong, count = [], 0
    for page, text in PAGES.items():
        for place in set(_PLACE.findall("\n".join(inline(text)) + "\n" + blocks(text))):
            if _FOREIGN.match(place) or "RECIPE" in place or re.search(rf"--(plot|out)={re.escape(place)}", text):
                continue
            count += 1
            if not any((folder / place).exists() for folder in _FOLDERS):
                wrong.append(f"{page}: {place}")
    assert count > 60
    assert wrong == []


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs both make them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", head.lower()).strip() for head in heads]
    return {re.sub(r"[-\s]+", "-", head) for head in plain}


def test_links_and_pictures_lead_somewhere():
    wrong, count = [], 0
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
            if link.startswith(("http", "mailto:")):
                continue
            target, _, anchor = link.partition("#")
            count += 1
            is_there = not target or (ROOT / "docs" / target).exists()
            if is_there and anchor and "balcap_jax." not in anchor:
                is_there = anchor in slugs(PAGES[target or page])
            if not is_there:
                wrong.append(f"{page}: {link}")
    assert count > 60
    assert wrong == []


def test_every_page_is_in_the_list_of_pages():
    listed = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(PAGES)


def test_questions_are_bold_lines_of_their_own():
    """docs/make/readable.py makes headings of them."""
    questions = re.findall(r"^\*\*.*$", PAGES["faq.md"], re.MULTILINE)
    assert len(questions) > 50
    assert [one for one in questions if not re.fullmatch(r"\*\*.+\?( Why\?)?( What .*\?)?\*\*", one)] == []


def test_the_reward_of_the_page_scores(tmp_path, monkeypatch):
    (source,) = re.findall(r"^```python\n(.*?)^```", PAGES["extending.md"], re.MULTILINE | re.DOTALL)
    (tmp_path / "myrewards.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    command = next(words for words in commands(PAGES["extending.md"]) if "balcap_jax.train" in words)
    given = dict(word.removeprefix("--config.").split("=", 1) for word in command if word.startswith("--config."))
    config = recipes.load(str(ROOT / "configs" / "scenes.py"), given)
    assert given["rewards.name"] == "myrewards:Colours"
    rewards.check_settings(config)
    samples = Samples(
        example_ids=["a", "b"],
        captions=[["A red ball", "a blue thing on white ground"], ["nothing", "green"]],
        references=["a red cube on a white ground", "a cube"],
        reference_units=[(), ()],
        images=None,
        metadata=[{}, {}],
    )
    scores = rewards.build(config.rewards, None, tried_on=samples)(samples)
    np.testing.assert_allclose(scores.rewards[..., 0], [[0.5, 0.5], [1, 1]])
    np.testing.assert_allclose(scores.rewards[..., 1], [[1 / 3, 1 / 6], [1, 1]], rtol=1e-6)
    assert scores.valid.all()
    assert scores.detail[0][1]["named"] == ["blue", "white"]
    sys.modules.pop("myrewards")
