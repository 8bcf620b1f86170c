"""Damaged and odd files through every reader of what users give: an answer or a `UserError` of one line, in 2 s."""

import collections
import dataclasses
import functools
import itertools
import json
import os
import random
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import mutations
import numpy as np
import pytest
from PIL import Image
from system.command_runs import start

from balcap_jax import compare, convert, models, recaption
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import AppendedLines, read_jsonl, read_lines
from balcap_jax.config import recipes as configuration
from balcap_jax.data import listing, photos, sharegpt4v
from balcap_jax.data.scenes.tokenizer import build_tokenizer
from balcap_jax.evals import (
    balanced,
    caparena,
    captionqa,
    capture,
    checklist,
    dcscore,
    engine,
    inputs,
    side_by_side,
    vqa_data,
)
from balcap_jax.evaluate import read_judgements
from balcap_jax.judges import schema
from balcap_jax.judges.chat.parsing import UnusableAnswer, parse_answer
from balcap_jax.models.formats import hf, loading, peft, saving
from balcap_jax.models.formats.safetensors import read_directory
from balcap_jax.report.page import write_report
from balcap_jax.training import workdir
from balcap_jax.training.logging import MetricsWriter

SECONDS = 2.0  # of CPU time for one input
SIZES = {
    "vision_width": 16,
    "vision_layers": 2,
    "vision_heads": 2,
    "vision_mlp": 24,
    "width": 24,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "head_size": 12,
    "mlp": 32,
    "prompt_tokens": 28,
}
FAMILIES = {
    "llava": {"image_size": 32, "patch_size": 8},
    "qwen2_5_vl": {
        "patch_size": 4,
        "window_size": 16,
        "full_attention_layers": (1,),
        "mrope_section": (2, 2, 2),
        "qkv_bias": True,
        "max_image_tokens": 16,
    },
    "qwen3_vl": {
        "patch_size": 4,
        "vision_positions": 9,
        "deepstack_layers": (0,),
        "mrope_section": (2, 2, 2),
        "max_image_tokens": 16,
    },
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A file, and what reads it. `command`: the arguments of a command that does, the module first."""

    file: Path
    read: Callable[[], Any]
    command: Sequence[str] = ()

    @property
    def name(self) -> str:
        return "/".join(self.file.parts[-3:])


def write(path: Path, content: Any) -> Path:
    """A file of JSON, of lines of JSON where a list is for .jsonl, or of text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        content = "".join(json.dumps(line) + "\n" for line in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    return path


def of_configs(root: Path) -> list[Target]:
    values = write(root / "values.json", configuration.default_config().to_dict())
    recipe = write(
        root / "recipe.py",
        f"import json\nfrom balcap_jax.cli.files import read_bytes\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(json.loads(read_bytes({str(values)!r})), type_safe=False)\n",
    )
    overrides = write(
        root / "overrides.txt",
        "seed=3\nrollout.buckets=12,24\nrewards.weights=(1, 0.5, 2)\noptim.eps=1e-8\nrewards.gate=false\n",
    )
    saved = write(root / "workdir" / "config.json", configuration.default_config().to_dict())

    def override():
        lines = [line.decode(errors="surrogateescape").rstrip("\n") for line in read_lines(overrides)]
        pairs = [line.partition("=") for line in lines if line]
        configuration.load(f"{Path(__file__).parent}/micro.py", {name: text for name, _, text in pairs})

    return [
        Target(values, lambda: configuration.load(str(recipe)), ("balcap_jax.config", f"--config={recipe}")),
        Target(overrides, override),
        Target(saved, lambda: workdir.refuse_another_run(saved, configuration.default_config())),
    ]


def of_runs(root: Path) -> list[Target]:
    run = root / "run"
    caption = {
        "caption": "A dog.",
        "words": 2,
        "tokens": 3,
        "truncated": False,
        "in_band": True,
        "b_capscore": 50.0,
        "rewards": {"precision": 0.5, "recall": 0.5},
        "assertions": [{"text": "A dog.", "why": "", "verified": True, "pointable": True}],
        "covered": [True],
        "clarity": 4,
        "fluency": 4,
        "coherency": 4,
        "failures": {"recall": "down"},
        "habits": {"companion": True},
    }
    image = {"id": "a", "prompt": "p", "reference": "r", "reference_units": ["u"], "captions": [caption] * 2}
    means = {"precision": {"mean": 0.5, "std": 0.1}, "b_capscore": 50.0, "words": 8.0, "n": 4, "images": 2}
    means |= {"habits": {"companion": {"share": 0.5, "n": 2}}}
    records = [
        {"step": step, "stage": stage, "loss": 1.0, "reward/precision": 0.5, "time/update": 0.1, "kl": 0.0}
        for stage in ("sft", "rl")
        for step in range(1, 4)
    ]
    ceiling = means | {"b_capscore": 90.0}
    summary = {kind: {"align": ceiling, "sft": means, "rl": means} for kind in ("evaluations", "greedy")}
    summary |= {"seconds": {"sft": 3.0}, "judge": {"calls": 3, "failures": {"x": 1}}}
    files = {
        "metrics.jsonl": records,
        "config.json": {"name": "x", "stages": {"order": "align,sft,rl"}, "data": {"name": "scenes"}},
        "summary.json": summary,
        "samples/eval-sft.jsonl": [image],
        "samples/eval-rl.jsonl": [image, image | {"id": "b"}],
        "samples/greedy-rl.jsonl": [image, image | {"id": "b"}],
    }
    written = [write(run / name, content) for name, content in files.items()]
    page = root / "report.html"
    arguments = ("balcap_jax.report", str(run), f"--out={page}")
    scores = write(root / "scores" / "results.json", {"metric": "capture", "score": 50.0, "confidence": [40, 60]})
    parts = {"parts": [0.5, 0.5, 0.5, 0.5, 1.0], "score": 50.0}
    items = write(scores.parent / "items.jsonl", [{"id": f"i{i}", "group": f"i{i}", "words": 4, **parts} for i in "ab"])

    def compared():
        evaluations = [compare.read(scores.parent)]
        compare.markdown(evaluations)
        compare.page(evaluations)

    def resumed():
        with MetricsWriter(run, tensorboard=False) as log:
            log.truncate(2)

    def appended():
        with AppendedLines(items, remember=engine.read_row) as lines:
            lines.append([])

    return [
        *(Target(file, lambda: write_report([run], page), arguments) for file in written),
        Target(written[0], resumed),
        Target(written[2], lambda: workdir.read_summary(run)),
        Target(scores, compared, ("balcap_jax.compare", str(scores.parent))),
        Target(items, compared, ("balcap_jax.compare", str(scores.parent))),
        Target(items, appended),
    ]


def of_lists(root: Path) -> list[Target]:
    root.mkdir()
    for i, name in enumerate("abcd"):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(root / f"{name}.png")
    question = {"question": "Which?", "choices": ["one", "two"], "answer": "B"}
    pictures = [
        {"image": f"{name}.png", "id": name, "prompt": "Say.", "caption": f"A {name}.", "reference_units": ["u"]}
        | {"questions": [question], "rubrics": [{"criterion": "c", "weight": 1}], "captions": ["x", "y"]}
        for name in "abcd"
    ]
    images = write(root / "captions.jsonl", pictures)
    turns = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A dog."}]
    shared = write(root / "shared.json", [{"id": n, "image": f"{n}.png", "conversations": turns} for n in "abcd"])
    drafts = write(root / "drafts.jsonl", [{"image": "a.png", "caption": "A dog."}] * 2)
    settings = photos_settings(images)
    judge = configuration.default_config().judge
    recaptioned = ("balcap_jax.recaption", f"--images={shared}", "--estimate")
    vqa_json = {"data": [{"questionId": 1, "question": "What?", "answers": ["x"], "image": "a.png"}]}
    vqa_rows = [{"question_id": i, "question": "?", "A": "a", "B": "b", "answer": "A", "image": "a.png"} for i in "ab"]
    table = write(
        root / "vqa.tsv", "index\tquestion\tA\tB\tanswer\timage\n1\tWhat?\tx\ty\tA\taGk=\n2\tWho?\tx\ty\tB\t1\n"
    )
    readers: list[Target] = []

    def target(name: str, content: Any, read: Callable[[Path], Any]):
        file = write(root / name, content)
        readers.append(Target(file, lambda: read(file)))

    captions = {"a": "A dog.", "b": "A cat."}
    vqa_files = {"vqa.json": vqa_json, "vqa.jsonl": vqa_rows}
    for name, content in vqa_files.items():
        target(name, content, lambda file: list(vqa_data.read_questions(file)))
    for name, content in (("texts.json", captions), ("texts.jsonl", [{"id": "a", "caption": "A dog."}])):
        target(name, content, inputs.read_captions)
    checked = [{"id": "a", "items": [{"kind": "text", "question": "Is it?"}]}]
    target("checks.jsonl", checked, lambda file: checklist.Checklist().items(captions, file))
    graph = {"objects": ["dog"], "attributes": {"dog": ["red"]}, "relations": [["dog", "on", "mat"]]}
    graphs = [{"id": "a", "candidate": graph, "references": [graph]}]
    target("graphs.jsonl", graphs, lambda file: scored(capture.Capture(), lambda m: m.items(file, captions)))
    facts = [{"image_name": "a.png", "oracle_caption": "c", "oracle_facts": ["f"]}]
    target("facts.jsonl", facts, lambda file: dcscore.DCScore().items(captions, file, root))
    target("units.jsonl", pictures, lambda file: balanced.BCapScore().items(captions, file, root))
    rivals = {"a.png": {"ref_model": "m", "captions": {"m": "A dog.", "human": "h"}}}
    target("rivals.json", rivals, lambda file: caparena.CapArena().items(captions, file, root))
    asked = {"nat_1": [question | {"answer": "two", "category": ["x"]}]}
    target("asked.json", asked, lambda file: captionqa.CaptionQA().items({"nat_1": "A dog."}, file))
    votes = [{"x": {"metrics/C": "IIW is marginally better"}, "metrics/D": "Neutral"}]
    target(
        "votes.jsonl", votes, lambda file: [*map(side_by_side.markdown, side_by_side.comparisons(read_jsonl(file, "")))]
    )
    row = {"img": "a.png", "source1": "me", "source2": "m", "ref_model": "m", "judge": "Caption 1 is better."}
    target("rows.json", [row], lambda file: caparena.read_results(file, ""))
    given = type("Arguments", (), {"metric": "checklist", "name": ""})
    target(
        "given.jsonl", [{"id": "a", "judgement": {"answers": {"1": "yes"}}}], lambda f: read_judgements(str(f), given)
    )
    scored_by = (
        "balcap_jax.evaluate",
        "--metric=capture",
        f"--graphs={root / 'graphs.jsonl'}",
        f"--out={root / 'out'}",
    )
    readers = [
        dataclasses.replace(one, command=scored_by) if one.file.name == "graphs.jsonl" else one for one in readers
    ]
    return [
        *readers,
        Target(table, lambda: list(vqa_data.read_questions(table))),
        Target(images, lambda: listing.list_items(images, "p")),
        Target(images, lambda: photos.load(settings)),
        Target(shared, lambda: recaption.estimate(recaption.Sources(str(shared)), judge), recaptioned),
        Target(shared, lambda: [sharegpt4v.read_sample(one, "x") for one in sharegpt4v.read_annotations(shared)]),
        Target(drafts, lambda: recaption.Sources("", students=str(drafts)).drafts()),
    ]


def photos_settings(images: Path) -> dict[str, Any]:
    config = configuration.default_config()
    config.data.name, config.data.data_dir = "photos", str(images)
    return config.data.to_dict()


def scored(metric: engine.Metric, items: Callable[[engine.Metric], list[engine.Item]]) -> None:
    found = [item for item in items(metric) if item.caption is not None]
    for item, judgement in zip(found, metric.judge(None, found), strict=True):
        metric.parts(item, judgement)


def of_models(root: Path, family: str) -> list[Target]:
    sizes = FAMILIES[family]
    fields = configuration.default_config().model.to_dict() | SIZES | sizes | {"family": family}
    policy, processor = models.build(fields, build_tokenizer(["describe the picture.", "a red cube"]))
    like = jax.eval_shape(policy.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    model = models.save(root / family / "model", fields, params, processor)
    exported = convert.convert(model, root / family / "hf", shard_gb=2e-5)
    adapter, again = root / family / "adapter", root / family / "again"
    shapes = loading.flat_shapes(like)
    adapters = {path: np.ones((*shapes["decoder/layers/o/kernel"][:1], *size)) for path, size in of_o(shapes)}
    adapter.mkdir()
    peft.write(adapter, loading.CHECKPOINTS[family], shapes, adapters, peft.Origin(str(exported), 2.0, 1))

    def built(model=exported):
        loading.build_saved(model, loading.read_fields(model))

    def opened(exported=exported, shapes=shapes):
        hf.check(loading.open_checkpoint(exported), shapes, cast=True)

    def described(exported=exported):
        saving.carried_files(exported)
        loading.build_saved(exported, loading.read_fields(exported))

    def adapted(adapter=adapter, shapes=shapes):
        peft.find_base(adapter)
        peft.read(adapter, loading.CHECKPOINTS[family], shapes)

    command = ("balcap_jax.convert", f"--from={exported}", f"--out={again}")
    targets = [
        Target(exported / "balcap_jax.json", built, command),
        Target(exported / "tokenizer_config.json", built),
        Target(exported / "tokenizer.json", built),
        Target(exported / "config.json", opened, command),
        *(Target(file, opened) for file in sorted(exported.glob("*processor*.json"))),
        Target(exported / "model.safetensors.index.json", lambda exported=exported: read_directory(exported), command),
        Target(sorted(exported.glob("*.safetensors"))[0], opened, command),
        *(Target(exported / name, described) for name in ("generation_config.json", "config.json")),
        *(Target(adapter / name, adapted) for name in ("adapter_config.json", "adapter_model.safetensors")),
    ]
    return [target for target in targets if target.file.exists()]


def of_o(shapes: hf.Shapes) -> list[tuple[str, tuple[int, int]]]:
    """The adapters of rank 1 of the projection out of attention: path and shape of a layer."""
    _, heads, size, width = shapes["decoder/layers/o/kernel"]
    return [("decoder/layers/o/lora_a", (heads * size, 1)), ("decoder/layers/o/lora_b", (1, width))]


def of_answers(root: Path) -> list[Target]:
    statement = {"text": "A dog.", "why": "so", "verified": True, "pointable": False}
    answers = {
        schema.PrecisionVerdict: {"assertions": [statement] * 3},
        schema.RecallVerdict: {"covered": [True, False]},
        schema.LinguisticVerdict: {"clarity": 4, "fluency": 3, "coherency": 5},
        schema.ChoiceVerdict: {"answer": "B"},
    }
    found = []
    for number, (kind, answer) in enumerate(answers.items()):
        for form in ("{}", "<think>\n{{x}} so\n</think>\n```json\n{}\n```", "Here it is: {} I hope so."):
            file = write(root / f"{number}-{len(found)}.txt", form.format(json.dumps(answer)))
            found.append(Target(file, lambda file=file, kind=kind: parsed(file, kind)))
    return found


def parsed(file: Path, kind: type) -> None:
    try:
        parse_answer(file.read_bytes().decode(errors="replace"), kind)
    except UnusableAnswer as error:
        raise UserError(str(error)) from error


GROUPS = {"configs": of_configs, "runs": of_runs, "lists": of_lists, "answers": of_answers} | {
    family: functools.partial(of_models, family=family) for family in FAMILIES
}


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """group -> its targets, made on first use."""
    root = tmp_path_factory.mktemp("fuzz")
    return functools.cache(lambda name: GROUPS[name](root / name))


def damage(target: Target, whole: bytes, rng: random.Random) -> None:
    def change(content: bytes) -> bytes:
        return mutations.damaged(content, rng)

    is_weights = target.file.suffix == ".safetensors"
    target.file.write_bytes(mutations.in_header(whole, change, rng) if is_weights else change(whole))


def fuzz(targets: Sequence[Target], inputs: int, seed: int) -> collections.Counter:
    """Reads `inputs` damaged files; returns what went wrong, by reader and place, with the number of one input each."""
    wrong, refused = collections.Counter(), 0
    whole = {target.file: target.file.read_bytes() for target in targets}
    for target in targets:
        target.read()  # The whole file is read; and what is imported or compiled first counts for no input.
    for number in range(inputs):
        rng = random.Random(f"{seed}-{number}")
        target = targets[number % len(targets)]
        damage(target, whole[target.file], rng)
        started = time.process_time()
        try:
            target.read()
        except UserError as error:
            refused += 1
            if len(str(error).splitlines()) != 1:
                wrong[f"{target.name}: several lines: {error}"] += 1
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in where if "balcap_jax" in frame.filename]
            text = f"{type(error).__name__}: {error}"[:120]
            wrong[f"{target.name} (input {number}): {text} at {ours[-1] if ours else '?'}"] += 1
        if (seconds := time.process_time() - started) > SECONDS:
            wrong[f"{target.name} (input {number}): {seconds:.1f} s"] += 1
        target.file.write_bytes(whole[target.file])
    assert refused > inputs / 4  # Damage that nobody notices would prove nothing.
    return wrong


# What may lie where a file is expected. A pipe would block, a device never end, and the memory would not hold the last.
def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 40 << 30)


KINDS = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path),
    "huge": huge,
    "empty": Path.touch,
    "nothing": lambda path: None,
}


@pytest.mark.parametrize(
    ("group", "kind"),
    [*itertools.product(("configs", "lists", "llava"), KINDS), *itertools.product(("runs",), ("pipe", "huge"))],
)
def test_what_is_no_file_is_refused(targets, group, kind, capsys):
    picked = [target for target in targets(group) if target.file.suffix != ".txt"]  # Those are the test's own.
    if kind == "huge":  # Lines are read up to 64 MiB: one reader of each kind of file will do.
        picked = {target.file.suffix: target for target in picked}.values()
    for target in picked:
        whole = target.file.read_bytes()
        target.file.unlink()
        KINDS[kind](target.file)
        started = time.process_time()
        try:
            target.read()
        except UserError as error:
            assert len(str(error).splitlines()) == 1, target.name  # noqa: PT017
        finally:
            if target.file.is_dir():
                target.file.rmdir()
            target.file.unlink(missing_ok=True)
            target.file.write_bytes(whole)
        assert time.process_time() - started < SECONDS, target.name


@pytest.mark.parametrize(
    ("group", "inputs"), [("configs", 60), ("runs", 40), ("lists", 240), ("llava", 60), ("answers", 120)]
)
def test_readers(targets, group, inputs, capfd):
    assert fuzz(targets(group), inputs, seed=0) == {}
    assert "[transformers]" not in capfd.readouterr().err  # Its warnings would stand beside the one line.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "inputs"),
    [("configs", 1500), ("runs", 1500), ("lists", 3500), ("llava", 800), ("qwen2_5_vl", 700), ("answers", 2000)],
)
def test_readers_of_ten_thousand(targets, group, inputs, capfd):
    assert fuzz(targets(group), inputs, seed=1) == {}
    assert "[transformers]" not in capfd.readouterr().err  # Its warnings would stand beside the one line.


def through_commands(targets: Sequence[Target], inputs: int, seed: int) -> None:
    refused = 0
    for number in range(inputs):
        target = targets[number % len(targets)]
        whole, rng = target.file.read_bytes(), random.Random(f"{seed}-{number}")
        damage(target, whole, rng)
        process = start(*target.command)
        _, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors, f"{target.name}, input {number}: {errors}"
        if process.returncode:
            refused += 1
            assert errors.count("\n") == 1, f"{target.name}, input {number}: {errors}"
            assert errors.startswith("error: ")
        target.file.write_bytes(whole)
        for argument in target.command:
            if argument.startswith("--out="):
                shutil.rmtree(argument.removeprefix("--out="), ignore_errors=True)
    assert refused > inputs / 4


def of_commands(targets, *groups: str) -> list[Target]:
    return [target for group in groups for target in targets(group) if target.command]


def test_commands(targets):
    through_commands(of_commands(targets, "configs", "runs", "lists")[::3], 4, seed=2)


@pytest.mark.slow
def test_commands_with_fifty(targets):
    through_commands(of_commands(targets, *GROUPS), 50, seed=3)
