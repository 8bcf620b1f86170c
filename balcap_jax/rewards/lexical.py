"""ROUGE-L to the reference: a reward that needs no judge, and one that longer words of praise do not fool."""

from collections.abc import Sequence

from balcap_jax.data.words import words
from balcap_jax.rewards.base import RewardFn, Samples, Scores, collect


class LexicalReward(RewardFn):
    """K = 1: the F-measure (beta 1) of the longest common subsequence of words of caption and reference."""

    names: tuple[str, ...] = ("rouge_l",)
    gated: tuple[bool, ...] = (False,)
    needs: tuple[str, ...] = ("reference",)

    def __call__(self, samples: Samples) -> Scores:
        references = [words(text) for text in samples.references]
        scored = [[(rouge_l(words(samples.captions[b][g]), references[b]), {})] for b, g in samples.where]
        return collect(self, samples, scored, None)


def rouge_l(caption: Sequence[str], reference: Sequence[str]) -> float:
    """ROUGE-L F1 of two lists of words, in [0, 1]; 0 where either is empty or they share nothing."""
    common = longest_common_subsequence(caption, reference)
    if not common:
        return 0.0
    precision, recall = common / len(caption), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by the bit-vector of Hyyro (2004): one addition for each word.

    Bit i of `row` is 0 where the table of the textbook method grows at word i of `second`.
    """
    positions: dict[str, int] = {}
    for i, word in enumerate(second):
        positions[word] = positions.get(word, 0) | 1 << i
    every = (1 << len(second)) - 1
    row = every
    for word in first:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & every
    return len(second) - row.bit_count()
