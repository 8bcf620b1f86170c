"""Captions pictures on a mesh, in batches of one static shape, and goes on with a file of captions.

Of several processes each reads the pictures whose rows its devices hold, and process 0 writes. A batch is a slice of
the pictures that are left, so that the processes agree on it without asking each other.
"""

import contextlib
import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from balcap_jax import models
from balcap_jax.captioning import provenance
from balcap_jax.captioning.options import Options, mesh_sizes
from balcap_jax.captioning.provenance import beside
from balcap_jax.cli import storage
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import AppendedLines, resolved
from balcap_jax.cli.progress import ProgressLine
from balcap_jax.data import images
from balcap_jax.data.addresses import folder_of
from balcap_jax.data.items import items_of
from balcap_jax.data.listing import Item, picture_name
from balcap_jax.models import Prompt
from balcap_jax.models.prompting import PromptTooLong
from balcap_jax.parallel import distributed, sharding
from balcap_jax.parallel.host_batch import Rows
from balcap_jax.rollout import Rollout, Sampling, example_keys, make_rollout

_OVERRIDES = ("dtype", "prompt_tokens", "max_image_tokens")  # options that are fields of the model
_BLANK = np.zeros((32, 32, 3), np.uint8)


class Captioner:
    """A loaded model that captions batches of one static shape, for at most `pictures` of them, on `mesh`.

    `options` are those of `Options.of_model`.
    """

    def __init__(self, model: str | os.PathLike, options: Options, mesh: Mesh, pictures: int):
        self.options = options
        overrides = {name: value for name in _OVERRIDES if (value := getattr(options, name)) is not None}
        # Weights are only read here, in the compute type: no need to hold them in twice its size.
        policy, params, self.processor = models.load(model, mesh=mesh, param_dtype=options.dtype, **overrides)
        # The decoder stays in the layout of sampling: training's, which the update needs, is not kept.
        if relay := sharding.make_relay(mesh, params, options.dtype):
            params = relay(params)
        self._params = params
        self._rollout = make_rollout(policy, sampling_of(options))
        parts = sharding.parts_of(mesh)
        self.rows = Rows(mesh, parts * min(options.batch_size, -(-pictures // parts)))

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

    def run(self, items: Sequence[Item]) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
        """(lines, error lines) of one batch after the other, whole in all processes, which all take them at once."""
        size, held = self.rows.size, self.rows.held
        starts = range(0, len(items), size)
        mine = [items[start + row] for start in starts for row in held if start + row < len(items)]
        reading = read_ahead(mine, self.read, self.options.threads, len(held) + self.options.threads)
        for start in starts:
            batch = items[start : start + size]
            read = {int(row): next(reading)[1] for row in held if row < len(batch)}
            # A row may lie on devices of several processes: all of them must take it for unreadable, or none.
            errors: dict[int, str] = {}
            for found in distributed.all_gather({row: one for row, one in read.items() if isinstance(one, str)}):
                errors = found | errors
            lines: list[dict[str, Any]] = []
            if len(errors) < len(batch):
                good = [row for row in range(len(batch)) if row not in errors]
                with _enough_memory():
                    lines = self({row: batch[row] for row in good}, {row: read[row] for row in good if row in read})
            yield lines, [batch[row].names | {"error": errors[row]} for row in sorted(errors)]

    def __call__(self, items: Mapping[int, Item], prompts: Mapping[int, Prompt]) -> list[dict[str, Any]]:
        """The output lines of `items` by their row; `prompts` are those of the rows that this process holds."""
        held = [int(row) for row in self.rows.held]
        batch = [prompts.get(row, self._blank) for row in held]
        keys = example_keys([items[row].key if row in items else "" for row in held])
        inputs = self.rows.put((jax.tree.map(lambda *rows: np.concatenate(rows), *batch), keys))
        out = self._rollout(self._params, *inputs, np.uint32(self.options.seed), np.uint32(0))
        host = self.rows.fetch(out._replace(image_embeds=None))
        mine = [self._line(items.get(held[at]), host, at) for at in self.rows.own]
        return [line for line in self.rows.gather_list(mine) if line]

    @functools.cached_property
    def _blank(self) -> Prompt:
        """What fills rows without a picture, alike in all processes: it decides when the loop of a rollout ends."""
        return self.processor([_BLANK], [""], [""])

    def _line(self, item: Item | None, out: Rollout, row: int) -> dict[str, Any] | None:
        if item is None:
            return None
        own = {} if item.prompt == self.options.prompt else {"prompt": item.prompt}
        return item.names | self._best(out, row) | own

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

    def wide(self) -> int:
        """Pictures beyond the model's aspect ratio so far, of all processes."""
        mine = getattr(self.processor, "counts", {}).get("wide", 0) if len(self.rows.own) else 0
        return sum(distributed.all_gather(mine))


def sampling_of(options: Options) -> Sampling:
    temperature, greedy = options.temperature or 1.0, not options.temperature
    return Sampling(options.samples, options.max_tokens, temperature, options.top_p, options.top_k, greedy=greedy)


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


class CaptionFile:
    """The file of captions `out` with that of errors beside it, to be used in a `with` block.

    pending: the items that have neither a caption nor an error. counts: of the others, see `caption`.
    """

    def __init__(self, out: Path, items: Sequence[Item], folder: Path, settings: Mapping[str, Any], retry_errors: bool):
        self.out, self.settings, self._items, self._folder = out, dict(settings), items, folder
        self._retry_errors = retry_errors

    def __enter__(self) -> "CaptionFile":
        with contextlib.ExitStack() as stack:
            self._lines = lines = stack.enter_context(AppendedLines(self.out))
            self._errors = errors = stack.enter_context(AppendedLines(beside(self.out, ".errors.jsonl"), lazy=True))
            wanted = {item.key for item in self._items}
            captioned, failed = _keys(lines, self._folder), _keys(errors, self._folder)
            if lines.had_content or errors.had_content:
                provenance.check(self.out, self.settings)
            if self._retry_errors:
                errors.keep(lambda entry: _key(entry, self._folder) not in wanted)
                failed -= wanted
            self.pending = [item for item in self._items if item.key not in captioned | failed]
            self.counts = {"captions": len(wanted & captioned), "errors": len(wanted & failed - captioned)}
            self.counts |= {"new": 0, "wide": 0}
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def begin(self) -> ProgressLine:
        """Writes down how the captions are made, before the first of them."""
        provenance.write(self.out, self.settings)
        total = len(self._items)
        return ProgressLine("captions", total, total - len(self.pending))

    def append(self, lines: Sequence[dict[str, Any]], errors: Sequence[dict[str, Any]]) -> None:
        if errors:
            self._errors.append(errors)
        if lines:
            self._lines.append(lines)
        self.counts["captions"] += len(lines)
        self.counts["new"] += len(lines)
        self.counts["errors"] += len(errors)


def caption(
    model: str | os.PathLike,
    source: str | os.PathLike,
    out: str | os.PathLike,
    options: Options,
    *,
    retry_errors: bool = False,
    mesh: Mesh | None = None,
) -> dict[str, int]:
    """Writes the lines that `out` still lacks for the pictures of `source`: a folder, a JSONL file or parquet files.

    Returns the numbers of "captions" and "errors" in all, of "new" captions, and of new pictures that are too "wide".
    The model's configuration says whether those are padded or refused. `mesh`: None = all devices, data-parallel.

    Of several processes (`distributed.session`) each calls this with the same arguments and gets the same result.
    `source` is on a disk that they share; process 0 alone reads and writes `out`, which may be in a bucket.

    Raises:
      UserError: bad input, a file of other settings, or one that cannot be written.
    """
    options.check()
    provenance.existing(model)
    options = options.of_model(models.read_fields(model))
    mesh = sharding.make_mesh(mesh_sizes("")) if mesh is None else mesh
    with contextlib.ExitStack() as stack:
        file = None
        if distributed.is_first():
            out, source = resolved(out), resolved(source)
            items, folder = items_of(source, options.prompt), folder_of(source)
            settings = provenance.identity(model) | options.settings()
            stack.enter_context(storage.kept(out, provenance.files_of(out)))
            file = stack.enter_context(CaptionFile(out, items, folder, settings, retry_errors))
        pending, counts = distributed.from_first((file.pending, file.counts) if file else None)
        if not pending:
            return counts
        with _enough_memory():
            captioner = Captioner(model, options, mesh, len(pending))
        captioner.check_prompts(pending)
        progress = stack.enter_context(file.begin()) if file else None
        for lines, errors in captioner.run(pending):
            if file:
                file.append(lines, errors)
                progress.advance(len(lines) + len(errors))
        wide = captioner.wide()
        return distributed.from_first(file.counts | {"wide": wide} if file else None)


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
            "--prompt_tokens, give --dtype=bfloat16, or split the parameters over devices with --mesh=fsdp:-1"
        ) from error
