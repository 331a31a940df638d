"""A model of one's own plays and learns; and ours, given as functions, plays as before."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import OPD
from small_agent import household, household_agent, with_decoding
from updates import KEEPER, train_step

from opd_jax import losses, model
from opd_jax.agent import generate as gen
from opd_jax.agent.agent import Agent
from opd_jax.agent.contexts import ContextCache
from opd_jax.agent.conversation import Conversation
from opd_jax.agent.positions import Positions
from opd_jax.agent.rollout import rollout, row_keys
from opd_jax.learner.batch import Batch, pack
from opd_jax.learner.teacher import Teacher
from opd_jax.learner.train_state import init_state
from opd_jax.losses import NO_TURN
from opd_jax.model import Model
from opd_jax.model.lora import Lora, lora_specs
from opd_jax.runtime.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("compile_quickly")

ROWS, MAX_TURNS, WIDTH, DECAY = 4, 3, 8, 0.8
TASKS = [("train", 3), ("valid_seen", 5), ("valid_unseen", 0), ("train", 8), ("train", 9)]


# --- A decayed sum of embeddings: one state a conversation ----------------------------------------


def hidden(params: tuple[jax.Array, jax.Array], tokens: jax.Array) -> jax.Array:
    """Σ 0.8^(t - s) embed[s] over s ≤ t, as one product."""
    age = jnp.arange(tokens.shape[1])[:, None] - jnp.arange(tokens.shape[1])
    share = jnp.where(age >= 0, DECAY ** jnp.maximum(age, 0), 0.0)
    return jnp.einsum("ts,bsd->btd", share, params[0][tokens])


def append(params: Any, state: jax.Array, lengths: Any, tokens: Any, counts: Any) -> tuple:
    """The same, a token after another."""
    return _append(params, jnp.where(lengths[:, None] > 0, state, 0.0), tokens, counts)


def _append(params: Any, state: jax.Array, tokens: Any, counts: Any) -> tuple:
    states = []
    for t in range(tokens.shape[1]):
        state = jnp.where((t < counts)[:, None], DECAY * state + params[0][tokens[:, t]], state)
        states.append(state)
    return jnp.stack(states, axis=1), state


def head(params: tuple[jax.Array, jax.Array]) -> jax.Array:
    return params[1]


def init_cache(params: Any, rows: int, slots: int) -> jax.Array:
    return jnp.zeros((rows, WIDTH))


SUM = Model(hidden, head, init_cache, append)


def sum_params(vocab: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    embed, head = rng.normal(0, 0.6, (2, vocab, WIDTH)).astype(np.float32)
    return jnp.asarray(embed), jnp.asarray(head.T)


def play(agent: Agent, params: Any) -> list[Conversation]:
    return rollout(
        params,
        row_keys(jax.random.key(0), range(len(TASKS))),
        agent=agent,
        envs=[household(max_turns=MAX_TURNS) for _ in range(ROWS)],
        tasks=TASKS,
        depth=0,
    )


def packed(played: list[Conversation], vocab: int) -> Batch:
    verdict = np.full((len(played), MAX_TURNS), losses.Verdict.STRONG, np.int32)
    return pack(played, verdict, length_multiple=8, response_multiple=8, vocab_size=vocab)


@pytest.fixture(scope="module")
def ours() -> Agent:
    return household_agent(chunk=5, extend_widths=(16,))


@pytest.fixture(scope="module")
def vocab(ours: Agent) -> int:
    return len(ours.tokenizer)


def update(student: Model, params: Any, batch: Batch) -> tuple[Any, dict[str, Any]]:
    """The gradient of one update by OPD from a teacher that gives all tokens the same chance."""
    uniform = Teacher(
        jnp.zeros((*batch.response.shape, 2)), {"head": jnp.zeros((2, head(params).shape[1]))}
    )
    state, metrics = train_step(student, OPD)(init_state(params, KEEPER, seed=0), uniform, batch)
    return state.opt_state.trace, metrics


def test_what_it_samples_is_what_it_is_trained_on(ours: Agent, vocab: int) -> None:
    params = sum_params(vocab)
    played = play(replace(ours, model=SUM), params)
    batch = packed(played, vocab)
    gradient, metrics = update(SUM, params, batch)
    assert 0 < metrics["sums"].logprob_error < 1e-5

    def loss(params: Any) -> jax.Array:  # the mean over the student's tokens, by hand
        logits = (hidden(params, batch.tokens) @ params[1])[:, :-1]
        logprobs = jax.nn.log_softmax(logits)
        divergence = jnp.sum(jnp.exp(logprobs) * (logprobs + np.log(vocab)), axis=-1)
        return jnp.mean(divergence[batch.turn_id[:, 1:] != NO_TURN])

    want, by_hand = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
    for got, expected in zip(gradient, by_hand, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_an_append_that_disagrees_shows_in_logprob_error(ours: Agent, vocab: int) -> None:
    params = sum_params(vocab)

    def forgetful(params: Any, state: Any, lengths: Any, tokens: Any, counts: Any) -> tuple:
        return _append(params, 0 * state, tokens, counts)

    wrong = replace(SUM, append=forgetful)
    played = play(replace(ours, model=wrong), params)
    assert update(wrong, params, packed(played, vocab))[1]["sums"].logprob_error > 0.1


def test_a_context_that_goes_back_is_read_anew() -> None:
    params = sum_params(32)
    cache = ContextCache(
        params,
        sizes=SUM,
        rows=5,
        slots=64,
        widths=(4, 16),
        rows_read=2,
        positions=Positions(),
        purpose="reading",
    )
    first = [[1] * 40, [2, 3, 4, 4], [5] * 6, [7] * 18, [8]]
    # Goes on, is cut, is another, is the same, begins.
    second = [[1] * 44, [2, 3, 9, 9, 9], [6, 5, 5], [7] * 18, [8, 9]]
    for contexts in (first, second):
        for row, context in enumerate(contexts):
            cache.put(row, context)
        cache.read(range(5))
        for row, context in enumerate(contexts):
            want = hidden(params, jnp.array([context[:-1] or [0]]))[0, -1] * (len(context) > 1)
            got = cache._cache.cache[row] * (len(context) > 1)
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


# --- Our transformer, given as functions ----------------------------------------------------------


def test_ours_given_as_functions_plays_the_same_bits(ours: Agent, random_params: Callable) -> None:
    sizes = ours.model
    assert isinstance(sizes, model.ModelConfig)
    params = gen.for_decoding(
        jax.tree.map(jnp.asarray, random_params(sizes, seed=4)), platform="cpu"
    )

    def grow(params: Any, cache: Any, lengths: Any, tokens: Any, counts: Any) -> tuple:
        held = replace(cache, lengths=lengths)
        return model.forward_cached(params, held, tokens, counts, config=sizes, sharded=False)

    def empty(params: Any, rows: int, slots: int) -> model.KVCache:
        return model.init_cache(sizes, batch=rows, slots=slots, dtype=jnp.float32)

    learner = model.functions_of(sizes, query_chunk=16, remat="none")
    given = replace(learner, init_cache=empty, append=grow)
    got, want = (play(replace(ours, model=which), params) for which in (given, sizes))
    for mine, its in zip(got, want, strict=True):
        assert mine.tokens == its.tokens
        assert mine.logprobs == its.logprobs
    assert sum(token != NO_TURN for c in got for token in c.turn_id) > 100


# --- What only a `ModelConfig` can ----------------------------------------------------------------


def test_what_only_our_transformer_can_is_refused(ours: Agent, vocab: int) -> None:
    params = sum_params(vocab)
    own = replace(ours, model=SUM)
    with pytest.raises(ValueError, match="`int8_cache`: a `Model` has a cache of its own"):
        play(with_decoding(own, int8_cache=True), params)
    with pytest.raises(ValueError, match="samples with `init_cache` and `append`: give both"):
        play(replace(own, model=Model(hidden, head)), params)
    with (
        jax.set_mesh(make_mesh(data=2, fsdp=1, tensor=1)),
        pytest.raises(ValueError, match=r"a `Model` samples on one device: .* got 2"),
    ):
        play(own, params)
    lora = Lora(rank=2, alpha=4.0, targets=("q",), int8=False)
    sampling = partial(gen.sampling_params, dtype=jnp.float32, gather=True, platform="cpu")
    for refused in (partial(lora_specs, lora=lora), lambda own: sampling(params, config=own)):
        with pytest.raises(
            ValueError, match="need the parameters of a `ModelConfig`, got a `Model`"
        ):
            refused(SUM)
