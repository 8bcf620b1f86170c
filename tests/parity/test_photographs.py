"""Photographs through Hugging Face directories as they are: `caption` against transformers' own files and `generate`.

BALCAP_PHOTOS names a folder with `images/`; the photographs are read where they are.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from balcap_jax import caption, models
from balcap_jax.models.prompting import PromptProcessor

torch = pytest.importorskip("torch", reason="transformers needs torch to run a model")
import tiny_checkpoints as tiny  # noqa: E402
from hub_directories import hub_directory  # noqa: E402
from read_in_transformers import read  # noqa: E402

PHOTOS = Path(os.environ.get("BALCAP_PHOTOS", Path(__file__).parents[3] / "shared" / "data" / "photos"))
COUNT, TOKENS = 3, 12
PROMPT = "Describe this image in detail."


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_photographs_get_the_tokens_that_transformers_gives_them(family, tmp_path, monkeypatch):
    photographs = sorted((PHOTOS / "images").glob("*.jp*g"))[:COUNT] if PHOTOS.is_dir() else []
    if len(photographs) < COUNT:
        pytest.skip(f"no photographs in {PHOTOS / 'images'} (BALCAP_PHOTOS names their folder)")
    model = hub_directory(family, tmp_path / "hub")
    decoded, decode = [], PromptProcessor.decode
    monkeypatch.setattr(
        PromptProcessor, "decode", lambda self, tokens: (decoded.append(tokens), decode(self, tokens))[1]
    )
    lines = "".join(json.dumps({"image": str(path)}) + "\n" for path in photographs)
    (tmp_path / "list.jsonl").write_text(lines)
    given = [f"--images={tmp_path / 'list.jsonl'}", f"--out={tmp_path / 'out.jsonl'}", f"--prompt={PROMPT}"]
    caption.main([f"--model={model}", *given, f"--max_tokens={TOKENS}", "--batch_size=2", "--dtype=float32"])
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    rows = np.concatenate([tokens.reshape(-1, TOKENS) for tokens in decoded])[:COUNT]

    policy, _, processor = models.load(model)
    drawn = []
    for path, line, row in zip(photographs, written, rows, strict=True):
        pixels = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        architecture = tiny.FAMILIES[family].__name__
        theirs = read(str(model), architecture, pixels, PROMPT, TOKENS, list(policy.forbidden))["tokens"]
        assert row[: len(theirs)].tolist() == theirs.tolist()
        assert line["tokens"] == len(theirs)
        assert line["caption"] == processor.tokenizer.decode(theirs, skip_special_tokens=True).strip()
        drawn.append(tuple(theirs))
    assert len(set(drawn)) > 1, "the photographs make no difference: nothing was tested"
