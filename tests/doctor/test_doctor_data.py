"""What `doctor` finds of data, prompts and references: each planted fault by name."""

import json

from doctor.set_up import ANNOTATIONS, assert_fault, cut, write_lines
from ml_collections import ConfigDict

from balcap_jax.doctor import checkpoint, pictures
from balcap_jax.doctor.findings import FAULT, OK, UNCHECKED, Finding


def of_data(config: ConfigDict) -> dict[str, Finding]:
    return {finding.check: finding for finding in pictures.look(config, 96, tokenizer=False)[0]}


def test_data_without_their_json(own):
    (own.folder / "data" / ANNOTATIONS).unlink()
    found = of_data(own.config())
    assert_fault(found["data"], "data", f"no {ANNOTATIONS} in ", "put ShareGPT4V's JSON there")
    assert found["references"].verdict == UNCHECKED


def test_pictures_that_were_not_fetched(own):
    for path in sorted((own.folder / "data" / "coco").iterdir())[:12]:
        path.unlink()
    assert_fault(of_data(own.config())["data"], "data", "12 of 24 pictures are left out: coco/0000", "fetch what is")


def test_pictures_that_are_empty(own):
    for path in sorted((own.folder / "data" / "coco").iterdir())[5:10]:
        path.write_bytes(b"")
    finding = of_data(own.config())["data"]
    assert_fault(finding, "data", "5 of 24 pictures are left out: coco/000000000005.png (", "fetch what is missing")


def test_pictures_that_are_cut_off(own):
    """They begin as pictures do, so that only opening them shows it."""
    for path in (own.folder / "data" / "coco").iterdir():
        if pictures.data.photos.split_of(f"coco/{path.name}", 0.2, 0.2) == "train" and "0" in path.name[-6:-4]:
            cut(path)
    finding = of_data(own.config())["data"]
    assert_fault(finding, "data", " are damaged: coco/0000", "fetch these pictures again")


def test_fewer_samples_than_a_batch(sound):
    finding = of_data(sound.config(stages__rl__batch_size=16))["data"]
    assert_fault(finding, "data", "13 samples to train on, and a batch of rl takes 16", "lower stages.rl.batch_size")


def test_a_few_pictures_may_be_missing(own):
    path = min((own.folder / "data" / "coco").iterdir())
    path.unlink()
    finding = of_data(own.config())["data"]
    assert finding.verdict == OK
    assert "1 left out: coco/000000000000.png (" in finding.found


def test_a_prompt_that_is_too_long_for_all(sound, seen, built):
    config = sound.config(data__prompt="word " * 300)
    finding = pictures.prompts(config, seen, built.processor)
    count = len(seen.looked_at) + len(seen.shown)
    found = f"{count} of {count} prompts that were looked at need more than model.prompt_tokens (224), up to "
    assert_fault(finding, "prompts", found, "set model.prompt_tokens to ")
    needed = int(finding.remedy.split()[3])
    enough = checkpoint.look(sound.config(model__prompt_tokens=needed), None)[1].processor
    assert pictures.prompts(config, seen, enough).verdict == OK
    short = checkpoint.look(sound.config(model__prompt_tokens=needed - 1), None)[1].processor
    assert pictures.prompts(config, seen, short).verdict == FAULT


def test_a_prompt_that_is_too_long_for_one(own, built):
    path = own.folder / "data" / ANNOTATIONS
    entries = json.loads(path.read_text())
    names = {entry["image"]: entry for entry in entries}
    name = next(name for name in names if pictures.data.photos.split_of(name, 0.2, 0.2) == "train")
    names[name]["conversations"][0]["value"] = "word " * 300
    path.write_text(json.dumps(entries))
    config = own.config()
    finding = pictures.prompts(config, pictures.look(config, 96, tokenizer=False)[1], built.processor)
    assert_fault(finding, "prompts", "1 of ", "or shorten the prompts")
    assert f"({name})" in finding.found


def test_captions_that_cannot_be_long_enough(own, built):
    path = own.folder / "data" / ANNOTATIONS
    path.write_text(path.read_text().replace("A picture. Of a thing.", "A thing is here. " * 40))
    config = own.config()
    finding = pictures.prompts(config, pictures.look(config, 96, tokenizer=False)[1], built.processor)
    assert_fault(finding, "prompts", "captions of rollout.max_tokens (16) end below", "raise rollout.max_tokens to ")


def test_units_that_are_not_there(sound):
    found = of_data(sound.config(data__units=sound.folder / "none.jsonl"))
    assert_fault(found["references"], "references", "none.jsonl", "")
    assert found["data"].verdict == OK


def test_units_about_half_of_the_pictures(own):
    lines = (own.folder / "units.jsonl").read_text().splitlines(keepends=True)
    (own.folder / "units.jsonl").write_text("".join(lines[::2]))
    found = of_data(own.config())
    assert_fault(found["references"], "references", "has no line about 12 of 24 samples", "run the same `recaption`")
    assert found["data"].verdict == OK


def test_units_about_other_pictures(own):
    write_lines(own.folder / "units.jsonl", [{"image": "elsewhere/a.png", "reference_units": ["a thing is there"]}])
    found = of_data(own.config())
    assert_fault(found["references"], "references", "no line of ", "give what recaption wrote about these")


def test_lines_without_what_the_reward_reads(own):
    lines = [json.loads(line) for line in (own.folder / "units.jsonl").read_text().splitlines()]
    write_lines(
        own.folder / "units.jsonl", [line | ({"reference_units": []} if n % 2 else {}) for n, line in enumerate(lines)]
    )
    finding = of_data(own.config())["references"]
    assert_fault(finding, "references", "have no reference_units, such as coco/", "have `recaption` write it")
    write_lines(own.folder / "units.jsonl", [{"image": line["image"], "caption": "A thing."} for line in lines])
    finding = of_data(own.config())["references"]
    assert_fault(finding, "references", "the reward needs 'reference_units'", "recaption")
