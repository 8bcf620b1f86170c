"""Sampling: what a sample depends on, when the loop ends, and the distributions that tokens are drawn from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llava import BOS, IMAGE, make_params, make_policy, make_prompt

from balcap_jax.drawing import categorical, truncate
from balcap_jax.models.policy import Prompt
from balcap_jax.rollout import Sampling, example_keys, make_rollout

PAD, EOS, V = 0, 2, 12
IDS = ("beach", "forest", "street", "harbour", "kitchen")


@dataclasses.dataclass(frozen=True, eq=False)
class Markov:
    """A policy whose next token depends on the last one alone: row i of params [V, V] are the logits after token i.

    The prompt is one token. `decoded` collects the index of every decoding step that was run.
    """

    decoded: list[int] | None = None
    vocab = V
    pad_token = PAD
    end_tokens = (EOS,)

    def encode(self, params, images):
        return jnp.zeros((images.shape[0], 1, 1))

    def prefill(self, params, prompt, image_embeds):
        return None, params[prompt.tokens[:, 0]]

    def empty_branch(self, batch, group, length):
        return jnp.zeros(())

    def decode(self, params, prefix, branch, tokens, t):
        if self.decoded is not None:
            jax.debug.callback(lambda t: self.decoded.append(int(t)), t)
        return branch, params[tokens]


MARKOV = Markov()


def markov_prompt(starts) -> Prompt:
    tokens = jnp.asarray(starts, jnp.int32)[:, None]
    return Prompt(tokens, tokens >= 0, jnp.zeros_like(tokens), jnp.zeros((len(tokens), 1, 1, 3), jnp.uint8))


def markov_logits(spread: float = 1.5) -> np.ndarray:
    """Random logits [V, V] in which PAD and BOS can't follow anything."""
    logits = (spread * np.random.default_rng(4).standard_normal((V, V))).astype(np.float32)
    logits[:, [PAD, BOS]] = -1e30
    return logits


compiled = functools.cache(make_rollout)


def draw(policy, params, prompt, sampling, ids, seed=0, step=0):
    out = compiled(policy, sampling)(params, prompt, example_keys(ids), jnp.uint32(seed), jnp.uint32(step))
    return jax.tree.map(np.asarray, out)


# --- what a sample depends on ---


def test_a_sample_depends_on_its_example_alone_and_not_on_the_batch():
    params, sampling = jnp.asarray(markov_logits()), Sampling(3, 20)
    starts = np.array([4, 5, 6, 4, 7])
    whole = draw(MARKOV, params, markov_prompt(starts), sampling, IDS)
    assert len(np.unique(whole.tokens.reshape(-1, 20), axis=0)) > 10  # else equal samples would prove nothing
    order = np.array([3, 0, 4, 2, 1])
    permuted = draw(MARKOV, params, markov_prompt(starts[order]), sampling, [IDS[i] for i in order])
    np.testing.assert_array_equal(permuted.tokens, whole.tokens[order])
    for part in (slice(0, 2), slice(2, 5)):
        alone = draw(MARKOV, params, markov_prompt(starts[part]), sampling, IDS[part])
        np.testing.assert_array_equal(alone.tokens, whole.tokens[part])
        np.testing.assert_allclose(alone.policy_log_probs, whole.policy_log_probs[part], rtol=1e-6)
    padded = draw(MARKOV, params, markov_prompt([*starts, 8, 9, 4]), sampling, [*IDS, "filler", "filler", "beach"])
    np.testing.assert_array_equal(padded.tokens[:5], whole.tokens)
    np.testing.assert_array_equal(padded.tokens[7], whole.tokens[0])  # "beach" again, from the same start


def test_more_samples_per_prompt_leave_the_first_ones_as_they_were():
    params, prompt = jnp.asarray(markov_logits()), markov_prompt([4, 5])
    few = draw(MARKOV, params, prompt, Sampling(2, 20), IDS[:2])
    many = draw(MARKOV, params, prompt, Sampling(7, 20), IDS[:2])
    np.testing.assert_array_equal(many.tokens[:, :2], few.tokens)


def test_a_longer_budget_only_goes_on():
    params, prompt = jnp.asarray(markov_logits()), markov_prompt([4, 5])
    short = draw(MARKOV, params, prompt, Sampling(4, 3), IDS[:2])
    long = draw(MARKOV, params, prompt, Sampling(4, 20), IDS[:2])
    np.testing.assert_array_equal(long.tokens[..., :3], short.tokens)
    assert short.truncated.any()


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"ids": ("beach2", "forest")}], ids=str)
def test_seed_step_and_example_each_change_the_samples(change):
    params, prompt = jnp.asarray(markov_logits()), markov_prompt([4, 5])
    first = draw(MARKOV, params, prompt, Sampling(8, 20), ids=("beach", "forest"))
    other = draw(MARKOV, params, prompt, Sampling(8, 20), **{"ids": ("beach", "forest"), **change})
    same = (first.tokens == other.tokens).all(-1)
    assert not same[0].all()
    assert same[1].all() == ("ids" in change)  # another image's id leaves this one's samples alone


def test_seed_and_step_are_not_interchangeable():
    params, prompt = jnp.asarray(markov_logits()), markov_prompt([4])
    swapped = [draw(MARKOV, params, prompt, Sampling(8, 20), IDS[:1], *pair).tokens for pair in ((1, 2), (2, 1))]
    assert (swapped[0] != swapped[1]).any()


def test_samples_of_the_llava_policy_do_not_depend_on_the_batch():
    policy = make_policy()
    params, prompt, sampling = make_params(policy), make_prompt(policy), Sampling(4, 9)
    whole = draw(policy, params, prompt, sampling, IDS[:3])
    assert len(np.unique(whole.tokens.reshape(-1, 9), axis=0)) == 12
    for b in (2, 0):
        one = jax.tree.map(lambda x: x[b : b + 1], prompt)  # noqa: B023
        alone = draw(policy, params, one, sampling, IDS[b : b + 1])
        np.testing.assert_array_equal(alone.tokens[0], whole.tokens[b])
        np.testing.assert_allclose(alone.policy_log_probs[0], whole.policy_log_probs[b], atol=1e-5)


# --- the loop and what it records ---


def chain(*successors: tuple[int, int]) -> jnp.ndarray:
    """Logits under which each token has one certain successor."""
    logits = np.full((V, V), -50.0, np.float32)
    for token, following in successors:
        logits[token, following] = 50.0
    return jnp.asarray(logits)


@pytest.mark.parametrize("greedy", [False, True])
def test_the_loop_ends_with_the_last_branch(greedy):
    decoded: list[int] = []
    params = chain((4, 5), (5, 6), (6, 7), (7, EOS), (EOS, 9))
    prompt = markov_prompt([4, 6, 7])
    out = draw(Markov(decoded), params, prompt, Sampling(2, 40, greedy=greedy), IDS[:3])
    jax.effects_barrier()
    # The first token comes from the prefill; after the third decoding step nothing is left to say.
    assert sorted(decoded) == [0, 1, 2]
    for row, said in enumerate([[5, 6, 7, EOS], [7, EOS], [EOS]]):
        for g in range(2):
            assert list(out.tokens[row, g]) == said + [PAD] * (40 - len(said))
            assert list(out.mask[row, g]) == [True] * len(said) + [False] * (40 - len(said))
            assert out.lengths[row, g] == len(said)
    assert not out.truncated.any()
    assert (out.policy_log_probs[~out.mask] == 0).all()


def test_no_decoding_step_runs_when_every_branch_ends_at_once():
    decoded: list[int] = []
    out = draw(Markov(decoded), chain((4, EOS)), markov_prompt([4]), Sampling(3, 40), IDS[:1])
    jax.effects_barrier()
    assert decoded == []
    assert (out.lengths == 1).all()
    assert not out.truncated.any()


def test_a_branch_without_end_token_is_truncated_and_one_that_ends_in_the_last_place_is_not():
    decoded: list[int] = []
    params = chain((4, 5), (5, 4), (6, 7), (7, 8), (8, EOS))
    out = draw(Markov(decoded), params, markov_prompt([4, 6]), Sampling(2, 3), IDS[:2])
    jax.effects_barrier()
    assert sorted(decoded) == [0, 1]
    np.testing.assert_array_equal(out.tokens[:, 0], [[5, 4, 5], [7, 8, EOS]])
    np.testing.assert_array_equal(out.truncated, [[True] * 2, [False] * 2])
    assert out.mask.all()
    assert (out.lengths == 3).all()


def test_forbidden_tokens_are_never_sampled_even_where_their_logits_are_highest():
    free = make_policy()
    forbidden = list(free.forbidden)
    params, prompt = make_params(free), make_prompt(free)
    # Two opposite directions: whatever the hidden state is, the logit of one of them is far above all others.
    direction = 20 * np.random.default_rng(6).standard_normal(free.decoder.width).astype(np.float32)
    params["decoder"]["head"] = params["decoder"]["head"].at[:, PAD].set(direction).at[:, IMAGE].set(-direction)
    sampling = Sampling(64, 9, temperature=2.0)
    unmasked = draw(dataclasses.replace(free, forbidden=()), params, prompt, sampling, IDS[:3])
    assert np.isin(unmasked.tokens[unmasked.mask], forbidden).mean() > 0.9
    for case in (sampling, Sampling(64, 9, temperature=2.0, top_p=0.9, top_k=20), Sampling(1, 9, greedy=True)):
        out = draw(free, params, prompt, case, IDS[:3])
        assert not np.isin(out.tokens[out.mask], forbidden).any()
        assert (out.tokens[~out.mask] == PAD).all()
        # No mass is on them either: what is drawn has the probabilities of a distribution over the others.
        assert (out.policy_log_probs > np.log(1e-6)).all()


# --- the distributions ---


def kept_distribution(logits, temperature: float, top_p: float, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """(truncated, un-truncated) probabilities [V] in double precision, token by token in order of likelihood."""
    scaled = np.float64(logits) / temperature
    full = np.exp(scaled - scaled.max())
    full /= full.sum()
    order = list(np.argsort(-full))
    if top_k:
        order = order[:top_k]
    mass_of_kept = full[order].sum()
    kept, mass = [], 0.0
    for token in order:
        if mass >= top_p and top_p < 1:
            break
        kept.append(token)
        mass += full[token] / mass_of_kept
    truncated = np.zeros_like(full)
    truncated[kept] = full[kept] / full[kept].sum()
    return truncated, full


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.0, 0.7, 0), (1.3, 1.0, 4), (1.5, 0.8, 6)]
)
def test_frequencies_are_those_of_the_truncated_distribution_and_log_probs_of_the_whole(temperature, top_p, top_k):
    draws, logits = 20_000, markov_logits()
    sampling = Sampling(draws, 2, temperature, top_p, top_k)
    out = draw(MARKOV, jnp.asarray(logits), markov_prompt([4]), sampling, IDS[:1])
    truncated, full = np.swapaxes([kept_distribution(row, temperature, top_p, top_k) for row in logits], 0, 1)
    previous = np.full(draws, 4)
    for t in range(2):
        going = out.mask[0, :, t]
        tokens = out.tokens[0, going, t]
        assert (truncated[previous[going], tokens] > 0).all()
        np.testing.assert_allclose(out.policy_log_probs[0, going, t], np.log(full[previous[going], tokens]), atol=2e-6)
        for state in np.unique(previous[going]):
            drawn = tokens[previous[going] == state]
            n, p = len(drawn), truncated[state]
            frequency = np.bincount(drawn, minlength=V) / n
            assert (frequency[p == 0] == 0).all()
            # Five standard deviations of a binomial share, over a hundred comparisons; one draw of slack for tiny n.
            assert (np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / n) + 1 / n).all(), (t, state)
        previous = out.tokens[0, :, t]
    if top_p < 1 or top_k:
        assert ((truncated == 0).sum(-1) > (full == 0).sum(-1)).all()  # something is cut everywhere
    else:
        np.testing.assert_allclose(truncated, full)


@pytest.mark.parametrize("vocab", [5, 256, 1000])
def test_categorical_draws_from_the_softmax_and_never_what_has_no_mass(vocab):
    logits = 3 * jax.random.normal(jax.random.key(0), (vocab,))
    forbidden = jnp.arange(vocab) % 4 == 1
    logits = jnp.where(forbidden, -1e30, logits).at[0].set(-jnp.inf)
    draws = 200_000
    keys = jax.random.split(jax.random.key(1), (100, draws // 100))

    @jax.jit
    def draw_all(keys, logits):  # An argument: XLA would spend seconds on what it can do with a constant.
        return jax.lax.map(lambda some: categorical(some, jnp.tile(logits, (len(some), 1))), keys)

    tokens = draw_all(keys, logits)
    found = np.bincount(np.asarray(tokens).ravel(), minlength=vocab)
    expected = draws * np.asarray(jax.nn.softmax(logits), np.float64)
    assert not found[np.asarray(forbidden)].any()
    assert found[0] == 0
    common = expected > 5
    chi2 = ((found - expected)[common] ** 2 / expected[common]).sum()
    # Mean and deviation of chi-squared with n degrees of freedom are n and sqrt(2 n).
    assert abs(chi2 - common.sum()) < 5 * np.sqrt(2 * common.sum())
    assert abs(found[~common].sum() - expected[~common].sum()) < 5 * np.sqrt(expected[~common].sum() + 1)


def test_members_and_positions_are_independent():
    """Draws of two members agree as often as two independent draws do, and so do two positions of one member."""
    flat = np.full((V, V), -1e30, np.float32)
    flat[:, 4:] = 0.0  # eight tokens, equally likely after any
    out = draw(MARKOV, jnp.asarray(flat), markov_prompt([4] * 2), Sampling(2000, 4), IDS[:2]).tokens
    for a, b in ((out[0, :, 1], out[0, :, 2]), (out[0, :-1, 1], out[0, 1:, 1]), (out[0, :, 1], out[1, :, 1])):
        share = (a == b).mean()
        assert abs(share - 1 / 8) < 5 * np.sqrt(1 / 8 * 7 / 8 / len(a))


def test_greedy_takes_the_likeliest_and_says_its_probability():
    logits = markov_logits()
    out = draw(
        Markov(), jnp.asarray(logits), markov_prompt([4, 5]), Sampling(2, 6, temperature=3.0, greedy=True), IDS[:2]
    )
    for b, start in enumerate((4, 5)):
        state, said = start, []
        while len(said) < 6 and EOS not in said:
            said.append(int(np.argmax(logits[state])))
            probability = kept_distribution(logits[state], 1.0, 1.0, 0)[1][said[-1]]
            np.testing.assert_allclose(out.policy_log_probs[b, :, len(said) - 1], np.log(probability), atol=2e-6)
            state = said[-1]
        assert list(out.tokens[b, 0]) == list(out.tokens[b, 1]) == said + [PAD] * (6 - len(said))


# --- truncate ---


def kept(logits, top_p=1.0, top_k=0) -> list[int]:
    out = np.asarray(truncate(jnp.asarray(logits, jnp.float32), top_p, top_k))
    np.testing.assert_array_equal(out[np.isfinite(out)], np.float32(logits)[np.isfinite(out)])
    return list(np.flatnonzero(np.isfinite(out)))


def test_truncate_against_the_slow_version():
    rng = np.random.default_rng(5)
    for top_p, top_k in ((0.3, 0), (0.9, 0), (0.95, 5), (1.0, 3), (0.2, 1)):
        rows = rng.standard_normal((50, 9)).astype(np.float32) * 2
        out = np.isfinite(np.asarray(truncate(jnp.asarray(rows), top_p, top_k)))
        expected = np.stack([kept_distribution(row, 1.0, top_p, top_k)[0] > 0 for row in rows])
        np.testing.assert_array_equal(out, expected)


def test_truncate_keeps_the_token_that_crosses_the_mass():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert kept(logits, top_p=0.45) == [0]
    assert kept(logits, top_p=0.55) == [0, 1]
    assert kept(logits, top_p=0.96) == [0, 1, 2, 3]


def test_truncate_keeps_one_token_at_least():
    assert kept([0.1, 0.3, 0.2], top_p=1e-9) == [1]
    assert kept([0.1, 0.3, 0.2], top_k=1) == [1]


def test_truncate_keeps_ties_at_the_border():
    assert kept([1.0, 2.0, 1.0, 0.0], top_k=2) == [0, 1, 2]
    assert kept([1.0, 1.0, 0.0], top_p=1e-9) == [0, 1]


def test_truncate_without_limits_changes_nothing():
    assert kept([1.0, 2.0, 3.0]) == [0, 1, 2]
    assert kept([1.0, 2.0, 3.0], top_k=3) == [0, 1, 2]
    assert kept([1.0, 2.0, 3.0], top_k=100) == [0, 1, 2]


def test_top_p_counts_the_mass_that_top_k_left():
    # 0.4 of the mass of the three that are left is 0.5, which is enough at once; of all tokens it would not be.
    logits = np.log([0.4, 0.25, 0.15, 0.1, 0.1])
    assert kept(logits, top_p=0.45) == [0, 1]
    assert kept(logits, top_p=0.45, top_k=3) == [0]
