"""What the length gate holds back on scenes, seen from the reward alone: means of c-GDPO advantages."""

import numpy as np
import pytest

from balcap_jax import advantages
from balcap_jax.data.scenes import captioner, language
from balcap_jax.data.scenes.world import sample_scene
from balcap_jax.data.words import count_words
from balcap_jax.judges.oracle import OracleJudge
from balcap_jax.rewards.balcap import BalCapReward
from balcap_jax.rewards.base import Samples

G = 8
SCENES = [sample_scene(seed) for seed in range(5000, 5040)]


@pytest.fixture(scope="module")
def cut() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Half of each group cut to two sentences: which [B, G], scores [B, G, 3], in band [B, G]."""
    rng = np.random.default_rng(0)
    is_cut = np.array([rng.permutation(np.arange(G) % 2) for _ in SCENES]).astype(bool)
    captions = [[captioner.base_caption(scene, rng) for _ in range(G)] for scene in SCENES]
    captions = [
        [
            ". ".join(text.split(". ")[:2]).rstrip(".") + "." if short else text
            for text, short in zip(*rows, strict=True)
        ]
        for rows in zip(captions, is_cut, strict=True)
    ]
    references = [language.reference_caption(scene, rng) for scene in SCENES]
    units = [language.reference_units(scene) for scene in SCENES]
    names = [str(scene.seed) for scene in SCENES]
    samples = Samples(names, captions, references, units, None, [{"scene": scene} for scene in SCENES])
    words = np.array([[count_words(text) for text in group] for group in captions])
    in_band = np.asarray(advantages.length_gate(words, np.array(list(map(count_words, references))), 0.5, 2.0))
    return is_cut, BalCapReward(OracleJudge())(samples).rewards, in_band


def gain(cut, weights, *, gated: bool) -> float:
    """The mean advantage of captions that are cut less that of the others, in standard deviations of the batch."""
    is_cut, scores, in_band = cut
    gate = np.ones(scores.shape, np.float32)
    if gated:
        gate[..., 2] = in_band
    combined = np.asarray(advantages.compute(scores, weights=np.float32(weights), gate=gate).combined)
    return float(combined[is_cut].mean() - combined[~is_cut].mean())


def test_the_gate_decides_where_recall_weighs_little(cut):
    """With weights 1, 0.25, 1 two sentences are worth more than a caption without the gate, and much less with it."""
    is_cut, _, in_band = cut
    assert in_band[is_cut].mean() < 0.1
    assert in_band[~is_cut].mean() > 0.85
    # Measured on 50 scenes: 0.28 without the gate and -1.19 with it; -0.38 and -1.41 with equal weights.
    assert gain(cut, [1, 0.25, 1], gated=False) == pytest.approx(0.28, abs=0.15)
    assert gain(cut, [1, 0.25, 1], gated=True) == pytest.approx(-1.19, abs=0.2)
    assert gain(cut, [1, 1, 1], gated=False) == pytest.approx(-0.38, abs=0.2)
    assert gain(cut, [1, 1, 1], gated=True) == pytest.approx(-1.41, abs=0.2)
