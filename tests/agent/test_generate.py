"""Sampling over a kept cache against whole forwards, and the draw itself against exact numbers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY
from scipy import stats
from scipy.special import log_softmax

from opd_jax import model
from opd_jax.agent import generate as gen
from opd_jax.agent.generate import Sampling

VOCAB = 24
SLOTS = 64
CONFIG = replace(
    TINY,
    vocab_size=VOCAB,
    num_heads=2,
    num_kv_heads=1,
    d_ff=32,
    rope_theta=1e3,
    max_positions=SLOTS,
)
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0)
PLAIN = Sampling(temperature=1.0, top_k=0, top_p=1.0)
NO_STOP = (-1, -1)  # always two, for one compiled program
PROMPTS = [[5], [7, 3, 7, 1, 22], [2, 9, 9, 9, 4, 17, 0, 23, 11]]


@pytest.fixture(scope="module")
def params(random_params: Callable) -> model.Params:
    # Far enough from uniform that every layer and every earlier token is felt.
    return jax.tree.map(jnp.asarray, random_params(CONFIG, seed=0))


@jax.jit
def _logits(params: model.Params, tokens: jax.Array) -> jax.Array:
    hidden = model.forward(params, tokens[None], config=CONFIG, query_chunk=SLOTS, remat="none")
    return (hidden @ model.head(params))[0]


def whole_forward(params: model.Params, tokens: list[int]) -> np.ndarray:
    """log p of the next token after each token, [T, V]; float64 from float32 logits."""
    padded = np.zeros(SLOTS, np.int32)
    padded[: len(tokens)] = tokens
    return log_softmax(np.asarray(_logits(params, padded), np.float64)[: len(tokens)], axis=-1)


def token_logprobs(params: model.Params, tokens: list[int]) -> np.ndarray:
    """Log-probability of each token but the first."""
    return whole_forward(params, tokens)[np.arange(len(tokens) - 1), tokens[1:]]


def greedy_continuation(params: model.Params, tokens: list[int], count: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(whole_forward(params, tokens)[-1].argmax()))
    return tokens[len(tokens) - count :]


def row_keys(rows: int, seed: int = 1) -> jax.Array:
    return jax.random.split(jax.random.key(seed), rows)


@dataclass
class Rows:
    """Conversations and the cache behind them; appends and samples as a rollout would."""

    params: model.Params
    cache: model.KVCache
    tokens: list[list[int]]

    @classmethod
    def start(cls, params: model.Params, prompts: list[list[int]]) -> "Rows":
        cache = model.init_cache(CONFIG, batch=len(prompts), slots=SLOTS, dtype=jnp.float32)
        rows = cls(params, cache, [[] for _ in prompts])
        rows.append(prompts)
        return rows

    def append(self, new: list[list[int]], width: int = 8) -> None:
        for row, tokens in zip(self.tokens, new, strict=True):
            row.extend(tokens)
        while True:
            held = np.asarray(self.cache.lengths)
            # A row to which nothing is appended keeps its place.
            pending = [
                row[h:-1] if fresh else []
                for row, h, fresh in zip(self.tokens, held, new, strict=True)
            ]
            if not any(pending):
                return
            block = np.zeros((len(pending), width), np.int32)
            counts = np.array([min(len(p), width) for p in pending], np.int32)
            for row, count in enumerate(counts):
                block[row, :count] = pending[row][:count]
            self.cache = gen.extend(
                self.params, self.cache, block, counts, config=CONFIG, sharded=False
            )

    def sample(
        self,
        budgets: list[int],
        *,
        sampling: Sampling,
        stop: tuple[int, ...] = NO_STOP,
        chunk: int = 4,
        keys: jax.Array | None = None,
    ) -> tuple[list[list[int]], list[list[float]], np.ndarray]:
        """Calls `generate` until every row has stopped or spent its budget."""
        budget = np.array(budgets, np.int32)
        drawn: list[list[int]] = [[] for _ in budgets]
        logprobs: list[list[float]] = [[] for _ in budgets]
        stopped = np.zeros(len(budgets), bool)
        keys = row_keys(len(budgets)) if keys is None else keys
        while budget.any():
            self.cache, out = gen.generate(
                self.params,
                self.cache,
                np.array([row[-1] for row in self.tokens], np.int32),
                budget,
                keys,
                jnp.array(stop, jnp.int32),
                config=CONFIG,
                sampling=sampling,
                chunk=chunk,
                sharded=False,
            )
            for row, count in enumerate(np.asarray(out.counts)):
                tokens = np.asarray(out.tokens)[row]
                assert not tokens[count:].any()
                assert not np.asarray(out.logprobs)[row, count:].any()
                drawn[row] += tokens[:count].tolist()
                logprobs[row] += np.asarray(out.logprobs)[row, :count].tolist()
                self.tokens[row] += tokens[:count].tolist()
            stopped |= np.asarray(out.stopped)
            budget = np.where(stopped, 0, budget - np.asarray(out.counts))
        return drawn, logprobs, stopped


# --- Against whole forwards ---------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [PLAIN, GREEDY, Sampling(temperature=0.4, top_k=5, top_p=0.8)])
def test_logprobs_are_the_models_own_whatever_the_sampling(
    params: model.Params, sampling: Sampling
) -> None:
    drawn, logprobs, _ = Rows.start(params, PROMPTS).sample([12, 12, 12], sampling=sampling)
    for prompt, tokens, sampled in zip(PROMPTS, drawn, logprobs, strict=True):
        recomputed = token_logprobs(params, prompt + tokens)[-len(tokens) :]
        np.testing.assert_allclose(sampled, recomputed, rtol=0, atol=1e-5)


def test_later_turns_over_the_kept_cache_equal_a_fresh_prefill(params: model.Params) -> None:
    rng = np.random.default_rng(3)
    rows = Rows.start(params, PROMPTS)
    for turn in range(4):
        # Ragged in what is appended and what is sampled; row 1 ends after its second turn.
        open_ = [True, turn < 2, True]
        if turn:
            sizes = [size if alive else 0 for size, alive in zip((1, 3, 11), open_, strict=True)]
            rows.append([rng.integers(0, VOCAB, size).tolist() for size in sizes])
        before = [list(row) for row in rows.tokens]
        budgets = [b if alive else 0 for b, alive in zip((turn, 3, 2), open_, strict=True)]
        drawn, logprobs, _ = rows.sample(budgets, sampling=GREEDY)
        for row, budget in enumerate(budgets):
            assert drawn[row] == greedy_continuation(params, before[row], budget)
            fresh = token_logprobs(params, rows.tokens[row])[len(before[row]) - 1 :]
            np.testing.assert_allclose(logprobs[row], fresh[:budget], rtol=0, atol=1e-5)
    assert len({token for row in rows.tokens for token in row}) > 4  # no fixed point hides an error

    fresh = Rows.start(params, rows.tokens)
    np.testing.assert_array_equal(rows.cache.lengths, [len(row) - 1 for row in rows.tokens])
    np.testing.assert_array_equal(rows.cache.lengths, fresh.cache.lengths)
    slots_first = (0, 2, 1, 3)
    for kept, prefilled in (
        *zip(rows.cache.keys, fresh.cache.keys, strict=True),
        *zip(rows.cache.values, fresh.cache.values, strict=True),
    ):
        for row, length in enumerate(np.asarray(rows.cache.lengths)):
            np.testing.assert_allclose(
                np.asarray(kept).transpose(slots_first)[row, :length],
                np.asarray(prefilled).transpose(slots_first)[row, :length],
                rtol=0,
                atol=2e-5,
            )


# --- What a sample depends on -------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(params: model.Params) -> list[list[int]]:
    """Twelve tokens of each prompt, sampled in a batch of one and in one call."""
    keys = row_keys(len(PROMPTS))
    return [
        Rows.start(params, [prompt]).sample(
            [12], sampling=PLAIN, chunk=16, keys=keys[row : row + 1]
        )[0][0]
        for row, prompt in enumerate(PROMPTS)
    ]


def test_a_sample_depends_on_its_key_and_its_row_alone(
    params: model.Params, alone: list[list[int]]
) -> None:
    together, _, _ = Rows.start(params, PROMPTS).sample([12] * 3, sampling=PLAIN, chunk=4)
    assert together == alone
    backwards, _, _ = Rows.start(params, PROMPTS[::-1]).sample(
        [12] * 3, sampling=PLAIN, keys=row_keys(3)[::-1]
    )
    assert backwards == alone[::-1]
    # A turn that other calls continue is the same turn.
    rows = Rows.start(params, PROMPTS)
    parts = [rows.sample(budgets, sampling=PLAIN)[0] for budgets in ([5, 1, 9], [7, 11, 3])]
    assert [first + second for first, second in zip(*parts, strict=True)] == alone


def test_another_key_gives_another_sample(params: model.Params, alone: list[list[int]]) -> None:
    other, _, _ = Rows.start(params, PROMPTS).sample(
        [12] * 3, sampling=PLAIN, keys=row_keys(3, seed=2)
    )
    assert all(a != b for a, b in zip(other, alone, strict=True))
    # The same prompt in two rows: each row draws with a key of its own.
    twins, _, _ = Rows.start(params, PROMPTS[:1] * 3).sample([12] * 3, sampling=PLAIN)
    assert len({tuple(row) for row in twins}) == 3


# --- Stops and budgets --------------------------------------------------------------------------


def test_a_row_stops_at_its_first_stop_token_and_keeps_it(
    params: model.Params, alone: list[list[int]]
) -> None:
    stop = (alone[0][3], alone[1][6])
    cut = [next((n + 1 for n, token in enumerate(row) if token in stop), len(row)) for row in alone]
    assert len(set(cut)) > 1
    rows = Rows.start(params, PROMPTS)
    drawn, _, stopped = rows.sample([12] * 3, sampling=PLAIN, stop=stop)
    assert drawn == [row[:n] for row, n in zip(alone, cut, strict=True)]
    assert stopped.tolist() == [row[n - 1] in stop for row, n in zip(alone, cut, strict=True)]
    np.testing.assert_array_equal(rows.cache.lengths, [len(row) - 1 for row in rows.tokens])
    # A stop token that is the last of the budget is a stop.
    _, _, stopped = Rows.start(params, PROMPTS).sample([cut[0], 1, 1], sampling=PLAIN, stop=stop)
    assert stopped[0]


@pytest.mark.parametrize("sampling", [PLAIN, GREEDY])
def test_ids_that_the_model_does_not_use_are_never_sampled(
    params: model.Params, sampling: Sampling
) -> None:
    config = replace(CONFIG, unused_ids=((0, 3), (9, VOCAB)))
    cache = model.init_cache(config, batch=3, slots=SLOTS, dtype=jnp.float32)
    drawn = gen.generate(
        params,
        cache,
        np.array([5, 7, 8], np.int32),
        np.full(3, 40, np.int32),
        row_keys(3),
        jnp.array(NO_STOP, jnp.int32),
        config=config,
        sampling=sampling,
        chunk=40,
        sharded=False,
    )[1]
    assert set(np.asarray(drawn.tokens).ravel().tolist()) <= {3, 4, 5, 6, 7, 8}
    for start, tokens, logprobs in zip((5, 7, 8), drawn.tokens, drawn.logprobs, strict=True):
        own = token_logprobs(params, [start, *tokens.tolist()])
        np.testing.assert_allclose(logprobs, own, rtol=0, atol=1e-5)


def test_budgets_are_met_exactly_and_a_row_without_one_is_untouched(
    params: model.Params, alone: list[list[int]]
) -> None:
    rows = Rows.start(params, PROMPTS)
    before = jax.device_get(rows.cache)
    drawn, _, stopped = rows.sample([0, 1, 6], sampling=PLAIN)
    assert drawn == [[], alone[1][:1], alone[2][:6]]
    assert not stopped.any()
    after = rows.cache.keys + rows.cache.values
    for old, new in zip(before.keys + before.values, after, strict=True):
        np.testing.assert_array_equal(old[0], np.asarray(new)[0])
    np.testing.assert_array_equal(rows.cache.lengths, before.lengths + np.array([0, 1, 6]))


def test_the_cache_passed_in_is_donated(params: model.Params) -> None:
    rows = Rows.start(params, PROMPTS)
    before = rows.cache
    rows.append([[1]] * 3)
    appended = rows.cache
    rows.sample([1] * 3, sampling=PLAIN)
    for cache in (before, appended):
        assert all(buffer.is_deleted() for buffer in cache.keys + cache.values)


# --- The draw -----------------------------------------------------------------------------------

DRAWS = 40_000
LOGITS = np.array([0.3, -1.0, 2.0, 0.9, -0.4, 1.4, -2.2, 0.0, 1.1, -0.7], np.float32)


def exact_probs(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution written down: temperature, the k most likely, then the smallest mass p."""
    weights = np.exp(logits.astype(np.float64) / sampling.temperature)
    order = np.argsort(-weights)
    if sampling.top_k:
        order = order[: sampling.top_k]
    mass = np.cumsum(weights[order]) / weights[order].sum()
    order = order[: 1 + np.count_nonzero(mass < sampling.top_p)]
    probs = np.zeros_like(weights)
    probs[order] = weights[order] / weights[order].sum()
    return probs


@partial(jax.jit, static_argnames=("sampling", "draws", "unused_ids"))
def draw(
    logits: jax.Array, seed: int, *, sampling: Sampling, draws: int, unused_ids: tuple = ()
) -> tuple:
    keys = jax.random.split(jax.random.key(seed), draws)
    logits = jnp.broadcast_to(logits, (draws, logits.shape[-1]))
    return gen.sample(logits, keys, sampling=sampling, unused_ids=unused_ids)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.4, 0, 1.0),
        (2.0, 3, 1.0),
        (1.0, 1, 1.0),
        (1.0, 99, 0.7),
        (1.0, 0, 1e-6),
        (1.5, 5, 0.8),
    ],
)
def test_draws_follow_the_exact_distribution(temperature: float, top_k: int, top_p: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    probs = exact_probs(LOGITS, sampling)
    assert sampling.greedy == (np.count_nonzero(probs) == 1)
    tokens, logprobs = map(np.asarray, draw(LOGITS, 0, sampling=sampling, draws=DRAWS))
    counts = np.bincount(tokens, minlength=len(LOGITS))
    assert not counts[probs == 0].any()
    # Merged below the usual least expectation of the chi-square approximation.
    large = DRAWS * probs >= 5
    expected = np.append(DRAWS * probs[large], DRAWS * probs[~large].sum())
    observed = np.append(counts[large], counts[~large].sum())
    if expected[-1] == 0:
        expected, observed = expected[:-1], observed[:-1]
    # One false alarm in a million, fixed before the first run; the draws are fixed too.
    statistic = np.sum((observed - expected) ** 2 / expected)
    assert statistic <= stats.chi2.isf(1e-6, df=max(len(expected) - 1, 1))
    reference = LOGITS.astype(np.float64) - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    np.testing.assert_allclose(logprobs, reference[tokens], rtol=0, atol=1e-6)


def test_ties_with_the_last_kept_token_are_kept() -> None:
    logits = np.array([0.0, 2.0, 1.0, 1.0, -1.0], np.float32)
    for sampling in (
        Sampling(temperature=1.0, top_k=2, top_p=1.0),
        Sampling(temperature=1.0, top_k=0, top_p=0.6),
    ):
        tokens, _ = draw(logits, 0, sampling=sampling, draws=1_000)
        assert set(np.asarray(tokens).tolist()) == {1, 2, 3}


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = np.full(12, -np.inf, np.float32)
    logits[[3, 4, 8]] = [0.0, -8.0, 1.0]  # zeros before, between and after
    tokens, logprobs = draw(logits, 0, sampling=PLAIN, draws=DRAWS)
    assert set(np.asarray(tokens).tolist()) == {3, 4, 8}
    assert np.isfinite(logprobs).all()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.0, 0, 1.0), (2.0, 2, 1.0), (1.0, 0, 0.6)]
)
def test_an_id_without_a_token_is_drawn_as_if_it_were_not_there(
    temperature: float, top_k: int, top_p: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    unused = [2, 3, 8, 9]  # the most likely one among them
    kept = np.array([n for n in range(len(LOGITS)) if n not in unused])
    got, logprobs = draw(LOGITS, 0, sampling=sampling, draws=500, unused_ids=((2, 4), (8, 10)))
    want, _ = draw(LOGITS[kept], 0, sampling=sampling, draws=500)
    np.testing.assert_array_equal(got, kept[want])
    own = log_softmax(LOGITS.astype(np.float64))[got]
    np.testing.assert_allclose(logprobs, own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", [71_342, 873_185, 880_173])
def test_rounding_in_the_cumulative_sum_draws_no_token_of_probability_zero(seed: int) -> None:
    # A parallel float32 sum can step by an ulp where nothing is added. With these keys a draw
    # falls on such a step: about one draw in 10^5 does at this size.
    size = 16_384
    masked = np.random.default_rng(0).random(size) < 0.5
    values = np.random.default_rng(1).normal(size=size).astype(np.float32)
    logits = jnp.where(masked, -jnp.inf, values)
    token, _ = gen.sample(logits[None], jax.random.key(seed)[None], sampling=PLAIN)
    assert not masked[int(token[0])]


def test_temperature_zero_is_the_argmax_for_every_key() -> None:
    tokens, logprobs = draw(LOGITS, 0, sampling=GREEDY, draws=100)
    assert set(np.asarray(tokens).tolist()) == {int(LOGITS.argmax())}
    expected = LOGITS.max() - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-6)
