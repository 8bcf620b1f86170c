"""Drawn response lengths, and the decoders and batches of uneven.py.

No published source gives the distribution of caption lengths during training. What is drawn here is a choice: a
lognormal with a mean of some share of the limit R and a deviation of half of the mean, cut at R.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from balcap_jax import advantages
from balcap_jax.cli.errors import UserError
from balcap_jax.models.decoder import DecoderConfig

EQUAL = "equal"  # every response has R tokens
# Old log-probabilities differ from those of a uniform distribution by this much (standard deviation).
STALENESS = 0.2


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder, B prompts of P tokens, G responses of at most R tokens for each."""

    decoder: DecoderConfig
    batch: int
    group: int
    prompt: int
    response: int


# Rotary base 1e6: Tunix 0.1.7's Llama rotates with it whatever its configuration says.
SHAPES = {
    "six_layers": Shape(
        DecoderConfig(8192, 576, 6, 9, 3, 64, 1536, rope_theta=1e6, tied_embeddings=True), 4, 8, 288, 512
    ),
    "135m": Shape(DecoderConfig(49152, 576, 30, 9, 3, 64, 1536, rope_theta=1e6, tied_embeddings=True), 2, 8, 576, 512),
    # Qwen2.5-0.5B's sizes in bfloat16, for accelerators.
    "500m": Shape(
        DecoderConfig(151936, 896, 24, 14, 2, 64, 4864, rope_theta=1e6, tied_embeddings=True, dtype="bfloat16"),
        16,
        8,
        512,
        1024,
    ),
}
SMALL = Shape(DecoderConfig(512, 64, 2, 4, 2, 16, 128, rope_theta=1e6, tied_embeddings=True), 2, 4, 32, 64)


def parse_means(text: str) -> tuple[str, ...]:
    """ "0.1,0.4,equal" -> ("0.1", "0.4", "equal").

    Raises:
      UserError: an entry is neither a share in (0, 1] nor "equal", or stands twice.
    """
    kinds = tuple(part.strip() for part in text.split(","))
    for kind in kinds:
        try:
            fits = kind == EQUAL or 0 < float(kind) <= 1
        except ValueError:
            fits = False
        if not fits:
            raise UserError(
                f"--means {text}: {kind or 'nothing'!r} is neither a share of R above 0 and at most 1 nor {EQUAL}"
            )
    if len(set(kinds)) < len(kinds):
        raise UserError(f"--means {text} names one twice")
    return kinds


def draw(rng: np.random.Generator, shape: Shape, kind: str, to_limit: bool) -> np.ndarray:
    """Lengths [B, G] int32 in tokens: lognormal, mean `kind` x R and deviation half of it before the cut at R.

    Args:
      kind: a share of R as text, or EQUAL.
      to_limit: the first response runs to R, so that no program can stop early.
    """
    limit, size = shape.response, (shape.batch, shape.group)
    if kind == EQUAL:
        return np.full(size, limit, np.int32)
    # A lognormal of mean m and deviation m / 2: sigma² = log(1 + 1/4), mu = log(m) - sigma² / 2.
    variance = np.log(1.25)
    lengths = np.exp(rng.normal(np.log(float(kind) * limit) - variance / 2, np.sqrt(variance), size))
    lengths = np.clip(lengths, max(2, limit // 64), limit).astype(np.int32)
    if to_limit:
        lengths[0, 0] = limit
    return lengths


def make_batches(shape: Shape, kind: str, to_limit: bool, draws: int, seed: int) -> list[dict[str, np.ndarray]]:
    """`draws` batches of random tokens, rewards and old log-probabilities, with drawn lengths.

    prompt_ids [B, P]; lengths [B, G]; responses, old_log_probs [B, G, T], T the longest length, 0 behind each length;
    rewards [B, G]; advantages [B, G], as c-GDPO normalises these rewards. The first batch is that of draws = 1.
    """
    rng = np.random.default_rng((seed, *kind.encode()))
    vocab = shape.decoder.vocab
    batches = []
    for _ in range(draws):
        lengths = draw(rng, shape, kind, to_limit)
        mask = np.arange(lengths.max()) < lengths[..., None]
        rewards = rng.random((shape.batch, shape.group)).astype(np.float32)
        combined = advantages.compute(rewards[..., None], weights=np.ones(1)).combined
        old = rng.normal(-np.log(vocab), STALENESS, mask.shape)
        batches.append(
            {
                "prompt_ids": rng.integers(1, vocab, (shape.batch, shape.prompt)).astype(np.int32),
                "responses": np.where(mask, rng.integers(1, vocab, mask.shape), 0).astype(np.int32),
                "lengths": lengths,
                "old_log_probs": np.where(mask, old, 0).astype(np.float32),
                "rewards": rewards,
                "advantages": np.asarray(combined),
            }
        )
    return batches


def write_batches(folder: Path, kind: str, batches: Sequence[dict[str, np.ndarray]]) -> list[str]:
    """Writes each batch as .npz and returns their paths.

    A file holds rows as trainers without a shared prompt do, each of the N = B x G responses with its own prompt:
    prompt_ids [N, P], completion_ids and old_per_token_logps [N, T], lengths, rewards and advantages [N].
    """
    paths = [folder / f"{kind}-{number}.npz" for number in range(len(batches))]
    for path, batch in zip(paths, batches, strict=True):
        length = batch["responses"].shape[2]
        np.savez(
            path,
            prompt_ids=np.repeat(batch["prompt_ids"], batch["lengths"].shape[1], axis=0).astype(np.int64),
            completion_ids=batch["responses"].reshape(-1, length).astype(np.int64),
            old_per_token_logps=batch["old_log_probs"].reshape(-1, length),
            **{name: batch[name].reshape(-1) for name in ("lengths", "rewards", "advantages")},
        )
    return list(map(str, paths))
