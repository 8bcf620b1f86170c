"""References in the formats that pre-training studies compare, of photographs and of rows of parquet files."""

import hashlib
import json

import pyarrow as pa
import pytest
from commands.test_recaption import lines_of, run
from data.parquet_tables import all_of, pictures, png, settings, write
from judges.misbehaving import JudgeServer, blocks_of, kind_of, well_behaved

from balcap_jax import data, recaption
from balcap_jax.cli.errors import UserError
from balcap_jax.judges import prompts
from balcap_jax.judges.writers import FORMATS

# Of the system and the user's message. Answers in caches and records of runs are to these texts: a better one is a new
# version.
PUBLISHED = {
    "descriptive": "e16c31f3d268",
    "dense": "396f1fefd2cf",
    "fused": "447e45ddc34d",
    "short": "8bc315e86a07",
}


@pytest.fixture
def listed(tmp_path):
    """Three pictures with lines, of which the last has no text from the web."""
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    lines = [{"image": f"{i}.png", "alt_text": f"Alt {i}", "caption": "Old."} for i in range(3)]
    del lines[2]["alt_text"]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "list.jsonl"


@pytest.mark.parametrize("form", FORMATS)
def test_a_published_version_is_never_edited(form):
    system, user = prompts.render(FORMATS[form], request="r", **({"alt_text": "a"} if form == "fused" else {}))
    digest = hashlib.sha256(repr([system["content"], user["content"]]).encode()).hexdigest()[:12]
    assert digest == PUBLISHED[form]


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_has_its_prompt_and_says_so(listed, tmp_path, form):
    out = tmp_path / "out" / f"{form}.jsonl"
    out.parent.mkdir()
    with JudgeServer(well_behaved) as server:
        run(tmp_path, server, f"--images={listed}", f"--format={form}", f"--out={out}", "--prompt=Say it.")
        asked = [body for body in server.seen if kind_of(body) == "describe"]
    lines = lines_of(out)
    assert [line["image"] for line in lines] == [f"../{i}.png" for i in range(2 if form == "fused" else 3)]
    assert all(line["reference_units"] for line in lines)
    assert all(line["caption"].startswith("There is a thing") for line in lines)
    expected = prompts.render(FORMATS[form], request="Say it.", **({"alt_text": "Alt 0"} if form == "fused" else {}))
    assert any(body["messages"][0]["content"] == expected[0]["content"] for body in asked)
    texts = [dict(blocks_of(body)) for body in asked]
    assert {text["request"] for text in texts} == {"Say it."}
    assert sorted(text.get("alt", "") for text in texts) == (["Alt 0", "Alt 1"] if form == "fused" else [""] * 3)
    said = json.loads((tmp_path / "out" / f"{form}.settings.json").read_text())
    assert (said["format"], said["prompts"]) == (form, f"{FORMATS[form]}, units.v1")
    if form == "fused":
        (failed,) = lines_of(tmp_path / "out" / "fused.errors.jsonl")
        assert failed == {"error": "no alt_text to fuse with the picture", "image": "../2.png"}


def test_another_format_does_not_go_on_in_a_file(listed, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    with JudgeServer(well_behaved) as server:
        run(tmp_path, server, f"--images={listed}", "--format=short", f"--out={out}")
        before, requests = out.read_bytes(), server.requests
        with pytest.raises(SystemExit):
            run(tmp_path, server, f"--images={listed}", "--format=dense", f"--out={out}")
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert "has lines made with" in line
        assert "short" in line
        assert (out.read_bytes(), server.requests) == (before, requests)
        run(tmp_path, server, f"--images={listed}", "--format=short", f"--out={out}")
        assert server.requests == requests


def test_files_of_earlier_versions_are_descriptive(listed, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    with JudgeServer(well_behaved) as server:
        run(tmp_path, server, f"--images={listed}", f"--out={out}")
        said = json.loads((tmp_path / "out.settings.json").read_text())
        assert said.pop("format") == "descriptive"
        (tmp_path / "out.settings.json").write_text(json.dumps(said))
        with pytest.raises(SystemExit):
            run(tmp_path, server, f"--images={listed}", "--format=short", f"--out={out}")
        assert "descri" in capsys.readouterr().err
        (tmp_path / "out.settings.json").write_text(json.dumps(said))
        run(tmp_path, server, f"--images={listed}", f"--out={out}")
    assert "3 lines (0 new)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--format=fused"], r"--format=fused needs the text that came with each picture, and no line of"),
        (["--format=long"], "invalid choice: 'long'"),
        (
            ["--write=units", "--format=short"],
            "--format=short is of --write=references",
        ),
        (
            ["--columns=image=jpg"],
            'list.jsonl, line 1: a line is an object with "image", the path of a picture; mend that',
        ),
        (["--columns=picture=jpg"], "config field 'data.columns': 'picture=jpg' is not FIELD=COLUMN"),
    ],
)
def test_bad_input_is_one_line(listed, tmp_path, capsys, arguments, named):
    listed.write_text('{"image": "0.png", "caption": "Old."}\n')
    with pytest.raises(SystemExit) as ended:
        recaption.main([f"--images={listed}", f"--out={tmp_path / 'x.jsonl'}", *arguments])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert not list(tmp_path.glob("x*"))


def test_the_estimate_is_of_the_format(listed, capsys):
    recaption.main([f"--images={listed}", "--format=dense", "--estimate"])
    told = capsys.readouterr().out
    assert "describe_dense.v1" in told
    assert "describe.v1" not in told


def test_rows_of_parquet_files_get_references_that_train(tmp_path, capsys):
    """By both ways: joined to the rows, and as a data set of their own. A row without a picture is named."""
    for shard in range(2):
        table = {
            "jpg": pictures(range(5 * shard, 5 * shard + 5)),
            "alt": [f"Alt {i}" for i in range(5)],
            "text": ["Old."] * 5,
            "units": [["old unit"]] * 5,
        }
        table["jpg"][4] = table["jpg"][4] if shard else None
        write(tmp_path / "set" / f"train-{shard}.parquet", table, group=2)
    source, out = tmp_path / "set" / "train-*.parquet", tmp_path / "out" / "fused.jsonl"
    out.parent.mkdir()
    columns = "image=jpg,alt_text=alt,caption=text,reference_units=units"
    given = [f"--images={source}", f"--columns={columns}", "--format=fused", f"--out={out}"]
    with JudgeServer(well_behaved) as server:
        run(tmp_path, server, *given, concurrency=4)
        run(tmp_path, server, *given, concurrency=4)
        asked = [dict(blocks_of(body))["alt"] for body in server.seen if kind_of(body) == "describe"]
    assert sorted(asked) == sorted([f"Alt {i}" for i in (*range(4), *range(5))])
    written = {line["image"]: line for line in lines_of(out)}
    names = [f"train-{shard}.parquet#{row}" for shard in range(2) for row in range(5) if (shard, row) != (0, 4)]
    assert list(written) == [f"../set/{name}" for name in names]
    assert all(line["alt_text"].startswith("Alt ") for line in written.values())
    assert all("old unit" not in line["reference_units"] for line in written.values())
    (failed,) = lines_of(tmp_path / "out" / "fused.errors.jsonl")
    assert failed == {"error": "no picture", "image": "../set/train-0.parquet#4"}
    joined = all_of(data.load(settings(source, columns=columns, units=str(out)), 0, needs=["reference_units"]))
    alone = all_of(data.load(settings(out, name="photos"), 0, needs=["reference_units"]))
    assert sorted(joined) == sorted(names)
    for name in names:
        line, one, other = written[f"../set/{name}"], joined[name], alone[f"../set/{name}"]
        assert one["reference"] == other["reference"] == line["caption"]
        assert one["reference_units"] == other["reference_units"] == line["reference_units"]
        assert (one["image"] == other["image"]).all()


@pytest.mark.parametrize("pixels", [12, 1 << 20])
def test_lines_know_the_pictures_of_their_rows(tmp_path, pixels):
    """References, and units of captions that the rows have; a row without a caption is named, and the rest goes on."""
    captions = [f"Old {i}." for i in range(8)]
    captions[2], captions[5] = None, "  "
    table = write(tmp_path / "set" / "a.parquet", {"image": pictures(range(8)), "caption": captions})
    files = {kind: tmp_path / f"{kind}.jsonl" for kind in ("references", "units")}
    with JudgeServer(well_behaved) as server:
        for kind, out in files.items():
            given = [f"--images={table}", f"--write={kind}", f"--out={out}", f"--max_pixels={pixels}"]
            run(tmp_path, server, *given, "--columns=caption=caption")
    lines = lines_of(files["units"])
    assert [line["image"] for line in lines] == [f"set/a.parquet#{i}" for i in (0, 1, 3, 4, 6, 7)]
    assert [line["caption"] for line in lines] == [f"Old {i}." for i in (0, 1, 3, 4, 6, 7)]
    failed = lines_of(tmp_path / "units.errors.jsonl")
    assert failed == [{"error": "no caption", "image": f"set/a.parquet#{i}"} for i in (2, 5)]
    for out in files.values():
        assert len(all_of(data.load(settings(table, units=str(out)), 0))) == len(lines_of(out))
    write(table, {"image": pictures(range(8, 16)), "caption": captions})
    for out in files.values():
        with pytest.raises(UserError, match=f"than the one that {out} is about"):
            data.load(settings(table, units=str(out)), 0)


def test_rows_without_any_caption_are_one_line(tmp_path, capsys):
    table = write(tmp_path / "a.parquet", {"image": pictures(range(3)), "caption": pa.array([None] * 3, pa.string())})
    with pytest.raises(SystemExit) as ended:
        recaption.main([f"--images={table}", "--write=units", f"--out={tmp_path / 'x.jsonl'}"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has a caption, such as a.parquet#0 (no caption); name its column with --columns=caption=COLUMN" in line
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("kind", ["references", "units"])
def test_lines_of_other_forms_are_read_by_their_names(tmp_path, kind):
    """As those of DOCCI, with pictures in a folder of their own; what is written trains without naming anything."""
    (tmp_path / "images").mkdir()
    entries = []
    for i in range(5):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
        entry = {"image_file": f"{i}.png", "description": f"Old {i}.", "example_id": f"test_{i}", "split": "test"}
        entries.append(entry | {"id": i, "reference": "Another."})
    listed = tmp_path / "docci_descriptions.jsonlines"
    listed.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    out = tmp_path / "out.jsonl"
    given = [f"--images={listed}", "--columns=docci", f"--root={tmp_path / 'images'}", f"--write={kind}"]
    with JudgeServer(well_behaved) as server:
        run(tmp_path, server, *given, f"--out={out}")
        asked = [dict(blocks_of(body))["description"] for body in server.seen if kind_of(body) == "units"]
    lines = lines_of(out)
    assert [line["image"] for line in lines] == [f"images/{i}.png" for i in range(5)]
    assert all(line["reference_units"] and line["split"] == "test" for line in lines)
    if kind == "units":
        assert sorted(asked) == [line["caption"] for line in lines] == [f"Old {i}." for i in range(5)]
    shared = {"columns": "docci", "manual_dir": str(tmp_path / "images"), "units": str(out)}
    joined = all_of(data.load(settings(listed, name="photos", **shared), 0, needs=["reference_units"]))
    alone = all_of(data.load(settings(out, name="photos"), 0, needs=["reference_units"]))
    assert sorted(joined) == [f"{i}.png" for i in range(5)]
    for i, line in enumerate(lines):
        one, other = joined[f"{i}.png"], alone[f"images/{i}.png"]
        assert one["reference"] == other["reference"] == line["caption"]
        assert one["reference_units"] == other["reference_units"] == line["reference_units"]
