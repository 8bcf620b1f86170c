"""Captions pictures with a loaded model, in batches of one static shape, and goes on with a file of captions."""

import contextlib
import dataclasses
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from balcap_jax import models
from balcap_jax.captioning import provenance
from balcap_jax.captioning.provenance import beside
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import AppendedLines
from balcap_jax.cli.progress import ProgressLine
from balcap_jax.config.schema import FIELDS
from balcap_jax.data import images
from balcap_jax.data.listing import Item, list_items, picture_name
from balcap_jax.models import Prompt
from balcap_jax.models.prompting import PromptTooLong
from balcap_jax.rollout import Rollout, Sampling, example_keys, make_rollout

DEFAULT_PROMPT = "Describe this image in detail."  # of models that name none
_RANGES = {
    "temperature": FIELDS["rollout.eval_temperature"],
    "top_p": FIELDS["rollout.top_p"],
    "top_k": FIELDS["rollout.top_k"],
    "max_tokens": FIELDS["rollout.max_tokens"],
    "samples": FIELDS["rollout.group_size"],
    "prompt_tokens": FIELDS["model.prompt_tokens"],
    "batch_size": dataclasses.replace(FIELDS["rollout.group_size"], low=1, high=4096),
    "threads": dataclasses.replace(FIELDS["rollout.group_size"], low=1, high=1024),
    "seed": dataclasses.replace(FIELDS["seed"], low=0, high=2**32 - 1),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How captions are made.

    `temperature` 0 is greedy. Of `samples` captions `keep` "best" writes the one with the highest mean log-probability;
    "all" writes all of them beside it. `prompt`, `dtype` and `prompt_tokens` override the model's (None: as it is).
    """

    prompt: str | None = None
    batch_size: int = 8
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    samples: int = 1
    keep: str = "best"
    seed: int = 0
    dtype: str | None = None
    prompt_tokens: int | None = None
    threads: int = 4

    def check(self) -> None:
        """Raises UserError for a value out of its range, and for several samples of a greedy caption."""
        for name, field in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not field.holds(value):
                raise UserError(f"--{name}={value} is out of range: it must be in {field.range_text}")
        if self.samples > 1 and not self.temperature:
            raise UserError(f"--samples={self.samples} needs --temperature above 0: greedy captions are all the same")

    @property
    def sampling(self) -> Sampling:
        temperature, greedy = self.temperature or 1.0, not self.temperature
        return Sampling(self.samples, self.max_tokens, temperature, self.top_p, self.top_k, greedy=greedy)

    def settings(self) -> dict[str, Any]:
        """What captions depend on; all captions of one file share it."""
        names = ["prompt", "temperature", "max_tokens", "dtype"]
        if self.temperature:
            names += ["top_p", "top_k", "samples", "keep", "seed"]
        return {name: getattr(self, name) for name in names}


class Captioner:
    """A loaded model that captions batches of one static shape."""

    def __init__(self, model: str | os.PathLike, options: Options):
        self.options = options
        overrides = {"dtype": options.dtype, "prompt_tokens": options.prompt_tokens}
        overrides = {name: value for name, value in overrides.items() if value is not None}
        # Weights are only read here, in the compute type: no need to hold them in twice its size.
        param_dtype = options.dtype or models.read_fields(model)["dtype"]
        policy, params, self.processor = models.load(model, param_dtype=param_dtype, **overrides)
        self._params = jax.device_put(params)
        self._rollout = make_rollout(policy, options.sampling)

    def check_prompts(self, items: Sequence[Item]) -> None:
        """Raises UserError for a prompt that does not fit, before the first picture is read."""
        first = {item.prompt: item.key for item in reversed(items)}
        image_tokens = [self.processor.image_tokens] * len(first)
        try:
            self.processor.encode_prompts(list(first), image_tokens, list(first.values()))
        except PromptTooLong as error:
            needs = str(error).partition(" but ")[0]
            raise UserError(
                f"{needs}, the model has room for {self.processor.prompt_tokens}; give "
                f"--prompt_tokens={error.needed}, or a shorter prompt"
            ) from error

    def read(self, item: Item) -> Prompt:
        """The prompt [1, ...] of one picture, on the host; called by several threads.

        Raises:
          ImageError: it cannot be read.
          UserError: the processor refuses it.
        """
        if item.error:
            raise images.ImageError(item.error)
        image = images.read(item.path)
        try:
            return self.processor([image], [item.prompt], [item.key])
        except MemoryError as error:
            height, width = image.shape[:2]
            raise images.ImageError(f"{width} x {height} pixels: no memory left to resize it") from error

    def __call__(self, items: Sequence[Item], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """One output line per item; fewer than a batch are filled up with copies of the last."""
        fill = self.options.batch_size - len(items)
        batch = jax.tree.map(lambda *rows: np.concatenate(rows), *prompts, *[prompts[-1]] * fill)
        keys = example_keys([item.key for item in items] + [items[-1].key] * fill)
        out = self._rollout(self._params, batch, keys, np.uint32(self.options.seed), np.uint32(0))
        host = jax.device_get(out._replace(image_embeds=None))
        return [item.names | self._best(host, row) for row, item in enumerate(items)]

    def _best(self, out: Rollout, row: int) -> dict[str, Any]:
        """The caption of one picture with the highest mean log-probability at the sampling temperature."""
        texts = self.processor.decode(out.tokens[row])
        means = out.policy_log_probs[row].sum(-1) / out.lengths[row]
        samples = [
            {"caption": text.strip(), "tokens": int(length), "truncated": bool(cut)}
            for text, length, cut in zip(texts, out.lengths[row], out.truncated[row], strict=True)
        ]
        best = samples[int(np.argmax(means))]
        if self.options.keep == "all":
            samples = [sample | {"log_prob": float(mean)} for sample, mean in zip(samples, means, strict=True)]
            return best | {"samples": samples}
        return best


def read_ahead(
    items: Sequence[Item], read: Callable[[Item], Prompt], threads: int, ahead: int
) -> Iterator[tuple[Item, Prompt | str]]:
    """Each item with its prompt, or with the reason why there is none; at most `ahead` are read before their turn."""
    pending: deque[tuple[Item, Future]] = deque()
    remaining = iter(items)
    pool = ThreadPoolExecutor(threads)
    try:
        while True:
            for item in itertools.islice(remaining, ahead - len(pending)):
                pending.append((item, pool.submit(read, item)))
            if not pending:
                return
            item, future = pending.popleft()
            try:
                yield item, future.result()
            except (images.ImageError, UserError) as error:
                yield item, str(error)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def caption(
    model: str | os.PathLike,
    source: str | os.PathLike,
    out: str | os.PathLike,
    options: Options,
    *,
    retry_errors: bool = False,
) -> dict[str, int]:
    """Writes the lines that `out` still lacks for the pictures of `source`, a folder or a JSONL file.

    Returns the numbers of "captions" and "errors" in all, of "new" captions, and of new pictures that are too "wide".
    The model's configuration says whether those are padded or refused.

    Raises:
      UserError: bad input, a file of other settings, or one that cannot be written.
    """
    options.check()
    if options.prompt is None:
        provenance.existing(model)
        options = dataclasses.replace(options, prompt=models.read_fields(model).get("prompt") or DEFAULT_PROMPT)
    items = list_items(source, options.prompt)
    wanted = {item.key for item in items}
    folder, out = Path(source), Path(out)
    folder = folder if folder.is_dir() else folder.parent
    settings = provenance.identity(model) | options.settings()
    with AppendedLines(out) as lines, AppendedLines(beside(out, ".errors.jsonl"), lazy=True) as errors:
        captioned, failed = _keys(lines, folder), _keys(errors, folder)
        if lines.had_content or errors.had_content:
            provenance.check(out, settings)
        if retry_errors:
            errors.keep(lambda entry: _key(entry, folder) not in wanted)
            failed -= wanted
        pending = [item for item in items if item.key not in captioned | failed]
        counts = {"captions": len(wanted & captioned), "errors": len(wanted & failed - captioned)}
        counts |= {"new": 0, "wide": 0}
        if not pending:
            return counts
        with _enough_memory():
            captioner = Captioner(model, options)
        captioner.check_prompts(pending)
        provenance.write(out, settings)
        with ProgressLine("captions", len(items), len(items) - len(pending)) as progress:
            ready: list[tuple[Item, Prompt]] = []
            for number, (item, prompt) in enumerate(
                read_ahead(pending, captioner.read, options.threads, options.batch_size + options.threads), start=1
            ):
                if isinstance(prompt, str):
                    errors.append([item.names | {"error": prompt}])
                    counts["errors"] += 1
                    progress.advance(1)
                else:
                    ready.append((item, prompt))
                if ready and (len(ready) == options.batch_size or number == len(pending)):
                    with _enough_memory():
                        lines.append(captioner(*zip(*ready, strict=True)))
                    counts["captions"] += len(ready)
                    counts["new"] += len(ready)
                    progress.advance(len(ready))
                    ready = []
        counts["wide"] = getattr(captioner.processor, "counts", {}).get("wide", 0)
    return counts


def _key(entry: dict[str, Any], folder: Path) -> str:
    return entry["id"] if "id" in entry else picture_name(folder, entry["image"])


def _keys(lines: AppendedLines, folder: Path) -> set[str]:
    """The keys of all lines, of pictures in `folder`. Raises UserError for a line that names no picture."""
    for number, entry in enumerate(lines.entries, start=1):
        if not isinstance(entry.get("id", entry.get("image")), str):
            raise UserError(
                f'{lines.path}, line {number} names no picture: "id" or "image" must be text; mend or remove that line'
            )
    return {_key(entry, folder) for entry in lines.entries}


@contextlib.contextmanager
def _enough_memory() -> Iterator[None]:
    """Makes too little memory, of the device or the host, a UserError."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "captioning needs more memory than there is; lower --batch_size, --samples, --max_tokens or "
            "--prompt_tokens, or give --dtype=bfloat16"
        ) from error
