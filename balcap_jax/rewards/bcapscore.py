"""b-CapScore: one number that is high only when precision, recall and language are all high (method, section 5)."""

from collections.abc import Sequence

import numpy as np

OBJECTIVES = ("precision", "recall", "linguistic")


def three_of(rewards: np.ndarray, valid: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Precision, recall and linguistic [...] of `rewards` [..., K], and whether `valid` holds for all three.

    Nothing is valid for a reward without these objectives.
    """
    if not set(OBJECTIVES) <= set(names):
        nothing = np.zeros(rewards.shape[:-1])
        return nothing, nothing, nothing, nothing.astype(bool)
    columns = [list(names).index(name) for name in OBJECTIVES]
    return *(rewards[..., k] for k in columns), valid[..., columns].all(-1)


def harmonic_mean(precision, recall, linguistic) -> np.ndarray:
    """Elementwise harmonic mean of three arrays of one shape with values in [0, 1]; 0 where any of them is 0."""
    terms = np.stack(np.broadcast_arrays(*(np.asarray(term, np.float64) for term in (precision, recall, linguistic))))
    positive = (terms > 0).all(axis=0)
    inverse = np.sum(1.0 / np.where(positive, terms, 1.0), axis=0)
    return np.where(positive, len(terms) / inverse, 0.0)


def b_capscore(precision, recall, linguistic, valid=None) -> float:
    """Mean over images of the harmonic mean of the three (ungated) scores, x100.

    `valid` (bool, same shape) leaves out images with a missing score; NaN when none is left.
    """
    terms = _selected(precision, recall, linguistic, valid)
    return float(100.0 * harmonic_mean(*terms).mean()) if terms[0].size else float("nan")


def corpus_b_capscore(precision, recall, linguistic, valid=None) -> float:
    """Harmonic mean of the three means over images, x100; higher than `b_capscore` where single images fail.

    `valid` (bool, same shape) leaves out images with a missing score; NaN when none is left.
    """
    terms = _selected(precision, recall, linguistic, valid)
    return float(100.0 * harmonic_mean(*(term.mean() for term in terms))) if terms[0].size else float("nan")


def _selected(precision, recall, linguistic, valid) -> list[np.ndarray]:
    terms = np.broadcast_arrays(*(np.asarray(term, np.float64) for term in (precision, recall, linguistic)))
    mask = np.broadcast_to(True if valid is None else np.asarray(valid, bool), terms[0].shape)
    return [term[mask] for term in terms]
