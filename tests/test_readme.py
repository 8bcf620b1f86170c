"""README.md: its commands, paths, fields, links and numbers are what the tree has, and it reads as it should."""

import contextlib
import importlib
import importlib.util
import io
import json
import re
import shlex
import types
from pathlib import Path

import pytest
import yaml

import balcap_jax
from balcap_jax import advantages, evaluate, rewards
from balcap_jax.cli.arguments import split_overrides
from balcap_jax.config import recipes
from balcap_jax.data.scenes import builder, language
from balcap_jax.data.scenes.world import Scene
from balcap_jax.evals import vqa
from balcap_jax.judges import oracle
from balcap_jax.models.formats.loading import FAMILIES

ROOT = Path(__file__).parents[1]
PACKAGE = Path(balcap_jax.__file__).parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
CODE = re.findall(r"`([^`\n]+)`", PROSE)
FIGURES = ROOT / "docs" / "figures"
RECORD = json.loads((FIGURES / "before_after.json").read_text())
in_tree = pytest.mark.skipif(not (ROOT / "balcap_jax").is_dir(), reason="the package's own pages lie in its tree alone")


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


def section(title: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    level, text = re.search(rf"^(#+) {re.escape(title)}\n(.*)", TEXT, re.MULTILINE | re.DOTALL).groups()
    return re.split(rf"^#{{1,{len(level)}}} ", text, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of the first table of a text, without its rule; the head comes first."""
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return [[cell.strip("| ") for cell in row] for row in cells if not set("".join(row)) <= set("-|")]


def commands() -> list[list[str]]:
    """The words of each command of the blocks, comments and environment apart from them left out."""
    lines = "\n".join(BLOCKS).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


# --- how it reads -----------------------------------------------------------------------------------------------------


def test_no_line_and_no_sentence_is_long():
    assert [line for line in TEXT.splitlines() if len(line) > 120] == []
    text = re.sub(r"<picture>.*?</picture>", "", PROSE, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"`[^`\n]+`", "code", text)
    # A cell, an item and a paragraph each end what stands in them.
    units = [unit for part in re.split(r"\n\s*\n|\n(?=[-|>#])", text) for unit in re.split(r"\|", part)]
    sentences = [one for unit in units for one in re.split(r"(?<=[.?!])\s+", " ".join(unit.split()))]
    assert len(sentences) > 200
    assert [one for one in sentences if len(one.split()) > 25] == []


def test_the_first_screen_has_three_sentences_a_picture_two_commands_and_a_table():
    head = TEXT.partition("## I want to")[0]
    opening, _, rest = head.partition("<picture>")
    sentences = re.findall(r"[.](?:\s|$)", re.sub(r"\]\([^)]*\)", "]", opening))
    assert len(sentences) == 3
    assert rest.index("</picture>") < rest.index("```bash") < rest.index("| greedy captions")
    assert [command[:2] for command in commands()[:2]] == [["bash", "launch/quickstart.sh"], ["bash", "launch/test.sh"]]
    assert rest[: rest.index("| mean words")].count("\n") < 25


# --- what it names ----------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@in_tree
def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", PROSE) + re.findall(r'(?:src|srcset)="([^"]+)"', PROSE)
    local = [link for link in links if not link.startswith("https://")]
    assert len(local) > 30
    for link in local:
        name, _, anchor = link.partition("#")
        target = ROOT / name if name else ROOT / "README.md"
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link
    assert {link for link in links if link.startswith("https://")} == {
        "https://arxiv.org/abs/2605.07394",
        "https://github.com/google/tunix/issues/977",
    }


def test_paths_and_names_in_code_exist():
    theirs = set(re.findall(r"`([^`\n]+)`", TEXT[TEXT.index("<details>") : TEXT.index("</details>")]))
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    seen = 0
    for code in set(CODE) - theirs:
        is_path = re.fullmatch(r"[\w./-]+(/|\.(py|sh|md|cff))", code)
        if not is_path:
            continue
        seen += 1
        known = (ROOT / code).exists() or (PACKAGE.parent / code).exists() or (PACKAGE / code).exists()
        assert known or f'"{code.strip("/")}"' in source, code
    assert seen > 25
    for _, *row in [["", *row] for row in rows(section("How it works"))[1:]]:
        for name in re.findall(r"`([^`]+)`", row[0]):
            assert (PACKAGE / name).exists(), name
    for name, _ in rows(section("How it works").partition("leaves in its workdir")[2])[1:]:
        for file in re.findall(r"`([^`]+)`", name):
            assert f'"{file.strip("/")}"' in source, file


def test_every_folder_and_file_of_the_package_is_in_the_map():
    named = set(re.findall(r"^\| .*", section("How it works").partition("leaves in its workdir")[0], re.MULTILINE)[1:])
    named = {name for row in named for name in re.findall(r"`([a-z_]+(?:/|\.py))`", row)}
    parts = {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    starts = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py", "drawing.py", "refill.py"}
    assert parts | starts == named


def test_every_command_is_listed():
    table = rows(TEXT.partition("Commands, as")[2])[1:]
    listed = {name for row in table for name in re.findall(r"`(\w+)`", row[0])}
    commands = {path.stem for path in PACKAGE.glob("[a-z]*.py") if "def main(" in path.read_text()}
    assert listed == commands | {path.parent.name for path in PACKAGE.glob("*/__main__.py")}


def test_fields_are_fields():
    config = recipes.default_config()
    dotted = [code for code in CODE if re.fullmatch(r"[a-z]+\.(?!py$|json)[a-z_]+", code)]
    named = [code for code in dotted if code.partition(".")[0] in config]
    assert "rewards.name" in named
    for field in named:
        group, _, name = field.partition(".")
        assert name in config[group], field


def assert_accepts(module: str, arguments: list[str]) -> None:
    """The --help of a command names every option of `arguments`."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        command = importlib.import_module(module)
        if isinstance(getattr(command, "__path__", None), types.GeneratorType | list):
            command = importlib.import_module(f"{module}.__main__")
        command.main(["--help"])
    for argument in arguments:
        if argument.startswith("--"):
            assert re.search(rf"{argument.partition('=')[0]}(?![\w-])", output.getvalue()), (module, argument)


def test_commands_are_commands():
    modules = []
    for words in commands():
        environment = [words.pop(0).partition("=")[0] for _ in range(len(words)) if re.match(r"[A-Z]+=", words[0])]
        if words[0] == "bash":
            script = (ROOT / words[1]).read_text()
            assert all(re.search(rf"\b{name}\b", script) for name in environment), words
            continue
        if words[:2] == ["hf", "download"]:
            continue
        if words[0] == "cp":
            assert (ROOT / words[1]).is_file(), words
            continue
        if words[:2] == ["python", "-m"]:
            module, arguments = words[2], words[3:]
        else:  # the command that the package installs
            assert words[0] == "balcap", words
            module, arguments = f"balcap_jax.{words[1]}", words[2:]
        modules.append(module.removeprefix("balcap_jax."))
        arguments, overrides = split_overrides(arguments)
        assert_accepts(module, arguments)
        for argument in arguments:
            name, _, value = argument.partition("=")
            if name == "--config":
                config = recipes.load(str(ROOT / value) if value.startswith("configs/") else value, overrides)
                assert config.name == Path(value.partition(":")[0]).stem
        assert not overrides or "--config" in " ".join(arguments)
    assert modules.count("train") >= 5
    assert {"caption", "aot", "report"} <= set(modules)
    for code in CODE:
        if code.startswith("python -m balcap_jax."):
            importlib.import_module(code.split()[2])


# --- what is supported ------------------------------------------------------------------------------------------------


def test_rewards_estimators_and_aggregations_are_all_there_are():
    table = rows(section("Rewards"))[1:]
    named = [name for row in table for name in re.findall(r"`([a-z_]+)`", row[0])]
    assert sorted(named) == sorted(rewards.REWARDS)
    text = section("Rewards")
    told = re.search(r"Estimators: (.*)\. Aggregations: (.*)\.\n", text)
    assert set(re.findall(r"`(\w+)`", told[1])) == set(advantages.ESTIMATORS) - {advantages.BEST_OF}
    assert set(re.findall(r"`(\w+)`", told[2])) == set(advantages.AGGREGATIONS)
    # As long as no study has trained them, tests are all there is.
    has_run = "Not yet run." not in re.search(r"<!-- ablate: rivals -->.*?<!-- end", page("studies"), re.DOTALL)[0]
    assert has_run == ("tests only" not in text), "docs/studies.md has other rewards trained whole: say so in README.md"


def test_metrics_are_all_there_are_and_compared_where_it_says():
    table = rows(section("Metrics"))[1:]
    told = {name: row for row in table for name in re.findall(r"`([a-z_0-9]+)`", row[0])}
    assert set(told) == set(evaluate.NEEDS) | set(vqa.BENCHMARKS)
    official = page("evaluation").partition("## What is as published")[2].partition("On 5,800 further")[0]
    compared = set(re.findall(r"`([a-z0-9]+)`(?=[^|]*\|[^|]*\|[^|]*\|$)", official, re.MULTILINE))
    assert {name for name, row in told.items() if row[1].startswith("scores equal")} == compared & set(told)
    asked = page("evaluation").partition("| metric | takes |")[2].partition("\n\n")[0]
    nothing = {name for row in asked.splitlines() if "| nothing" in row for name in re.findall(r"`([a-z0-9_]+)`", row)}
    assert {name for name, row in told.items() if row[2] == "no"} == nothing & set(told)


@in_tree
def test_models_and_their_errors_are_those_of_their_pages():
    table = rows(section("Models"))[1:]
    assert len(table) == len(FAMILIES)
    recipes_named = []
    for family, names, logits, gradients, tokens in table:
        text = (ROOT / re.search(r"\(([^)]+)\)", family)[1]).read_text()
        paths = re.findall(r"^\| logits (?:over responses|of the first)[^|]*\| ([\d.e-]+)", text, re.MULTILINE)
        assert logits == max(paths, key=float)
        assert gradients == re.search(r"^\| gradients [^|]*\| ([\d.e-]+)", text, re.MULTILINE)[1]
        assert (tokens == "same") == ("64 tokens, 6 prompts | equal, token for token |" in text)
        recipes_named += re.findall(r"`(\w+)`", names)
    others = {"vlm", "scenes", "photos", "forkme"}
    assert sorted(recipes_named) == sorted({path.stem for path in (ROOT / "configs").glob("*.py")} - others)


def test_extras_are_those_of_the_package():
    told = re.findall(r"`([a-z]+)` ", section("Installation by hand").partition("Extras:")[2])
    setup = (ROOT / "setup.py").read_text().partition("EXTRAS_REQUIRE = {")[2]
    assert set(told) <= set(re.findall(r'^    "(\w+)": ', setup, re.MULTILINE))
    assert len(told) == 7


# --- its numbers ------------------------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_results():
    told = rows(TEXT.partition("```\n\n")[2])
    assert told[0][1:] == ["before RL", "after RL", "change", "ceiling"]
    text = page("studies").partition("Greedy captions (128):")[2]
    measured = {row[0]: row[-4:] for row in rows(text)}
    assert len(told) == 6
    for name, *row in told[1:]:
        assert row == measured[name], name
    for head in ("Greedy captions (128):", "Sampled captions, 2 per image (256):"):
        short, whole = (rows(page(name).partition(head)[2])[1:] for name in ("results", "studies"))
        assert short == [[row[0], *row[-4:]] for row in whole]
    assert rows(text)[0][1:-4] == [f"seed {seed}" for seed in range(5)]
    assert "All 128 test scenes." in page("results")
    # The picture is of the seed whose change is the median one, of the run that is in the table.
    by_seed = next(row for row in rows(text) if row[0] == "b-CapScore")[1:-4]
    changes = [float(after) - float(before) for before, after in (cell.split(" → ") for cell in by_seed)]
    median = sorted(range(5), key=changes.__getitem__)[2]
    assert RECORD["command"].endswith(f"--config.seed={median}")


def test_what_fits_is_what_was_compiled():
    measured = page("performance")
    for _, chip, *sizes in rows(section("What fits where"))[1:]:
        assert f"--topology={chip}" in measured or chip in measured
        for size in sizes:
            assert re.search(rf"(?<![\d.]){re.escape(size)}(?![\d.])", measured), size
    for _, peer, ratio in rows(section("How fast"))[1:]:
        assert re.search(rf"\*\*{re.escape(ratio)}x?\*\*", measured), ratio
        assert peer in measured or f"google-{peer.lower()}" in measured
    times = re.search(r"\| balcap_jax \| ([\d.]+) .*\n\| transformers \| ([\d.]+) .*\n\| tunix \| ([\d.]+) ", measured)
    ours, *peers = map(float, times.groups())
    told = [row[2] for row in rows(section("How fast")) if "#rollout-beside-transformers-and-tunix" in row[0]]
    assert told == [f"{peer / ours:.2f}" for peer in peers]
    for name, version in zip(*[row[2:] for row in rows(section("Beside other projects"))[:2]], strict=True):
        if f"{name} " in measured and name != "MaxText":
            assert f"{name} {version}" in measured or f"google-{name.lower()} {version}" in measured, name


def test_the_citation_names_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert cited["license"] == "Apache-2.0"
    paper = cited["references"][0]
    assert paper["identifiers"][0]["value"] == "arXiv:2605.07394"
    quoted = " ".join(section("Citation").replace("\n>", "").split())
    assert paper["title"] in quoted
    for author in paper["authors"]:
        assert f"{author['given-names']} {author['family-names']}" in quoted


# --- its picture ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawing():
    """The script that draws the picture."""
    spec = importlib.util.spec_from_file_location("before_after", ROOT / "docs" / "make" / "before_after.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_drawn_from_its_record(drawing):
    assert drawing.draw(RECORD, narrow=False) == (FIGURES / "before_after.svg").read_text()
    assert drawing.draw(RECORD, narrow=True) == (FIGURES / "before_after_narrow.svg").read_text()


def test_the_record_is_of_a_test_scene_and_judged_as_the_oracle_judges():
    _, split, index = RECORD["id"].split("-")
    assert split == "test"
    settings = builder.make_config().settings
    assert builder.make_example(split, int(index), settings)["scene"] == RECORD["scene"]
    scene = Scene.from_json(RECORD["scene"])
    assert list(language.reference_units(scene)) == RECORD["reference_units"]
    for side in ("before", "after"):
        caption = RECORD[side]["caption"]
        verdict = oracle.judge_precision(caption, scene)
        assert [one.model_dump() for one in verdict.assertions] == RECORD[side]["assertions"]
        covered = oracle.judge_recall(caption, RECORD["reference_units"]).covered
        assert covered == RECORD[side]["covered"]
        marks = oracle.judge_linguistic(caption)
        right = sum(one.verified and one.pointable for one in verdict.assertions)
        three = (
            right / len(verdict.assertions),
            sum(covered) / len(covered),
            (marks.clarity + marks.fluency + marks.coherency) / 15,
        )
        assert RECORD[side]["b_capscore"] == pytest.approx(300 / sum(1 / one for one in three), abs=1e-3)
        assert f">{RECORD[side]['b_capscore']:.1f}<" in (FIGURES / "before_after.svg").read_text()


def test_words_are_marked_as_their_claims_are_judged(drawing):
    caption = "We see two shapes. A large red dotted ring is at the top left. The mood is calm."
    assertions = [
        {"text": "there are two shapes", "verified": True, "pointable": True},
        {"text": "there is a red ring", "verified": True, "pointable": True},
        {"text": "the red ring is large", "verified": False, "pointable": True},
        {"text": "the red ring is dotted", "verified": True, "pointable": True},
        {"text": "the red ring is at the top left", "verified": False, "pointable": True},
        {"text": "the mood is calm", "verified": False, "pointable": False},
    ]
    words = drawing.marked(caption, assertions)
    assert " ".join(word for word, _ in words) == caption
    by_mark = {mark: [word for word, its in words if its == mark] for mark in ("right", "wrong", "empty", "plain")}
    assert by_mark["right"] == ["two", "shapes.", "red", "dotted", "ring"]
    assert by_mark["wrong"] == ["large", "top", "left."]
    assert by_mark["empty"] == ["The", "mood", "is", "calm."]
    assert by_mark["plain"] == ["We", "see", "A", "is", "at", "the"]


def test_what_the_picture_says_holds_for_those_who_do_not_see_it(drawing):
    said = drawing.alternative(RECORD)
    for side in ("before", "after"):
        assertions = RECORD[side]["assertions"]
        right = [one for one in assertions if one["verified"] and one["pointable"]]
        assert f"{len(right)} of {len(assertions)} assertions hold" in said
    assert "ring" in TEXT.partition('alt="')[2].partition('"')[0]
