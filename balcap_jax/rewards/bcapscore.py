"""b-CapScore: one number that is high only when precision, recall and language are all high (method, section 5)."""

from collections.abc import Sequence

import numpy as np

OBJECTIVES = ("precision", "recall", "linguistic")


def three_of(rewards: np.ndarray, valid: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Precision, recall and linguistic [...] of `rewards` [..., K], and whether all three are valid, of `valid`.

    Of a reward without these objectives nothing is valid.
    """
    if not set(OBJECTIVES) <= set(names):
        nothing = np.zeros(rewards.shape[:-1])
        return nothing, nothing, nothing, nothing.astype(bool)
    columns = [list(names).index(name) for name in OBJECTIVES]
    return *(rewards[..., k] for k in columns), valid[..., columns].all(-1)


def harmonic_mean(precision, recall, linguistic) -> np.ndarray:
    """Elementwise harmonic mean of three arrays of one shape with values in [0, 1]; 0 where any of them is 0."""
    terms = np.stack(np.broadcast_arrays(*(np.asarray(one, np.float64) for one in (precision, recall, linguistic))))
    positive = (terms > 0).all(axis=0)
    inverse = np.sum(1.0 / np.where(positive, terms, 1.0), axis=0)
    return np.where(positive, len(terms) / inverse, 0.0)


def b_capscore(precision, recall, linguistic, valid=None) -> float:
    """Mean over images of the harmonic mean of the three (ungated) scores, x100.

    `valid` (bool, same shape) leaves out images with a missing score; NaN when none is left.
    """
    scores = harmonic_mean(precision, recall, linguistic)
    kept = scores[np.broadcast_to(True if valid is None else np.asarray(valid, bool), scores.shape)]
    return float(100.0 * kept.mean()) if kept.size else float("nan")


def corpus_b_capscore(precision, recall, linguistic, valid=None) -> float:
    """Harmonic mean of the three means over images, x100; higher than `b_capscore` where single images fail.

    `valid` (bool, same shape) leaves out images with a missing score; NaN when none is left.
    """
    terms = np.broadcast_arrays(*(np.asarray(one, np.float64) for one in (precision, recall, linguistic)))
    kept = np.broadcast_to(True if valid is None else np.asarray(valid, bool), terms[0].shape)
    if not kept.any():
        return float("nan")
    return float(100.0 * harmonic_mean(*(one[kept].mean() for one in terms)))
