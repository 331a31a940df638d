"""Compiled programs on meshes of eight devices compute what they compute on one.

One update, a rollout's sampling over two turns, and the judge's scores, on several meshes.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from models import TINY, assert_same_tree
from objectives import SAGE
from updates import KEEPER, random_adapters, teacher_of, train_step, two_turns

from opd_jax import model
from opd_jax.agent import generate as gen
from opd_jax.agent.generate import Sampling
from opd_jax.judge import answer as labels
from opd_jax.learner.batch import Batch
from opd_jax.learner.train_state import init_state, placement_of
from opd_jax.losses import Verdict
from opd_jax.model import ModelConfig, Params, init_params, param_specs
from opd_jax.model.lora import TARGETS, Lora, lora_specs, with_adapters
from opd_jax.plan.collectives import KINDS, collectives
from opd_jax.plan.hlo import parse
from opd_jax.runtime.mesh import (
    DECODING,
    MESH_AXES,
    TRAINING,
    Rules,
    make_mesh,
    param_shardings,
    shard_batch,
)

pytestmark = pytest.mark.usefixtures("compile_quickly")

STUDENT = replace(TINY, vocab_size=64, d_model=32, num_heads=8, num_kv_heads=4, d_ff=64, tied=True)
TEACHER = replace(STUDENT, d_model=64, tied=False)
# Each of its matrices is larger than the activations of a batch.
WIDE = replace(STUDENT, d_model=256, num_kv_heads=8, head_dim=32, d_ff=256)
LORA = Lora(rank=3, alpha=6.0, targets=TARGETS, int8=False)
ROWS = 16
SLOTS = 32


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    made = make_mesh(**dict(zip(MESH_AXES, request.param, strict=True)))
    with jax.set_mesh(made):
        yield made


@cache
def params(config: ModelConfig, seed: int) -> Params:
    with jax.set_mesh(make_mesh(data=1, fsdp=1, tensor=1)):
        made = jax.jit(partial(init_params, config, dtype=jnp.float32))(jax.random.key(seed))
    # Wider logits than those of new weights, so that nothing is nearly zero.
    return jax.tree.map(lambda x: np.asarray(x) * (2.0 if x.ndim > 1 else 1.0), made)


def placed(config: ModelConfig, seed: int, mesh: Mesh, rules: Rules = TRAINING) -> Params:
    shardings = param_shardings(param_specs(config), mesh, rules=rules)
    return jax.device_put(params(config, seed), shardings)


def batch() -> Batch:
    made = two_turns(ROWS, vocab=64)
    assert {*made.verdict.flat} == set(map(int, Verdict))
    return made


def placed_adapters(mesh: Mesh) -> Params:
    adapters = random_adapters(STUDENT, LORA, scale=0.2)
    return jax.device_put(adapters, param_shardings(lora_specs(STUDENT, LORA), mesh))


def step_on(placement: Any, lora: Lora | None = None) -> Callable:
    options = dict(micro_batches=2, batch_rows=ROWS, query_chunk=8, remat="layers", lora=lora)
    return train_step(STUDENT, SAGE, placement=placement, **options)


def update(mesh: Mesh, lora: Lora | None = None) -> tuple[Params, dict[str, Any]]:
    """The gradient of one update, and what it reported."""
    own = placed(STUDENT, 0, mesh)
    state = init_state(placed_adapters(mesh) if lora else own, KEEPER, seed=0)
    placement = placement_of(state)
    step = step_on(placement, lora)
    rows, base = shard_batch(batch(), mesh), own if lora else None
    teacher = teacher_of(TEACHER, placed(TEACHER, 1, mesh, DECODING), rows, micro_batches=2)
    state, metrics = step(state, teacher, rows, base)
    # The update leaves everything where it was, so the next one runs the same program.
    assert jax.tree.leaves(placement_of(state)) == jax.tree.leaves(placement)
    updated = jax.device_get((state.opt_state.trace, metrics))
    step(state, teacher, rows, base)
    assert step._cache_size() == 1
    return updated


def update_of_adapters(mesh: Mesh) -> tuple[Params, dict[str, Any]]:
    return update(mesh, LORA)


def sampled(mesh: Mesh) -> tuple[list[list[int]], np.ndarray]:
    return sampled_from(placed(STUDENT, 0, mesh))


def sampled_from_shards(mesh: Mesh) -> tuple[list[list[int]], np.ndarray]:
    return sampled_from(placed(STUDENT, 0, mesh), gather=False)


def sampled_with_adapters(mesh: Mesh) -> tuple[list[list[int]], np.ndarray]:
    return sampled_from(with_adapters(placed(STUDENT, 0, mesh), placed_adapters(mesh), LORA))


def sampled_from(params: Params, *, gather: bool = True) -> tuple[list[list[int]], np.ndarray]:
    """Tokens and log-probabilities of two turns, after ragged prompts and observations."""
    rng = np.random.default_rng(1)
    weights = gen.sampling_params(
        params, config=STUDENT, dtype=jnp.float32, gather=gather, platform="tpu"
    )
    kv = model.init_cache(STUDENT, batch=ROWS, slots=SLOTS, dtype=jnp.float32)
    keys = jax.random.split(jax.random.key(3), ROWS)
    place = kv.keys[0].sharding
    data, fsdp, decode, tensor = (place.mesh.shape[axis] for axis in MESH_AXES)
    heads = STUDENT.num_kv_heads // (decode * tensor)
    part = (ROWS // (data * fsdp), heads, SLOTS, STUDENT.head_dim)
    assert place.shard_shape(kv.keys[0].shape) == part
    rows: list[list[int]] = [[] for _ in range(ROWS)]
    logprobs = np.zeros((ROWS, 0), np.float32)
    last = np.ones(ROWS, np.int32)
    for turn in range(2):
        new = rng.integers(1, 64, (ROWS, 6)).astype(np.int32)
        new[:, 0] = last
        counts = rng.integers(1, 7, ROWS).astype(np.int32)
        sharded = model.is_sharded(weights)
        kv = gen.extend(weights, kv, *decoding((new, counts)), config=STUDENT, sharded=sharded)
        kv, out = gen.generate(
            weights,
            kv,
            *decoding((np.full(ROWS, 5, np.int32), np.full(ROWS, 4, np.int32))),
            jax.vmap(jax.random.fold_in, (0, None))(keys, turn),
            jnp.array([63]),
            config=STUDENT,
            sampling=Sampling(temperature=0.7, top_k=0, top_p=0.95),
            chunk=4,
            sharded=sharded,
        )
        # The very same sharding: the second turn runs the programs of the first.
        assert {buffer.sharding for buffer in (*kv.keys, *kv.values)} == {place}
        for row in range(ROWS):
            rows[row] += np.asarray(out.tokens)[row, : int(out.counts[row])].tolist()
        last = np.asarray(out.tokens)[:, 3]
        logprobs = np.concatenate([logprobs, np.asarray(out.logprobs)], axis=1)
    return rows, logprobs


def judged(mesh: Mesh) -> np.ndarray:
    """The judge's scores of three two-token labels after ragged questions."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, 64, (ROWS, 8)).astype(np.int32)
    counts = rng.integers(1, 9, ROWS).astype(np.int32)
    kv = model.init_cache(TEACHER, batch=ROWS, slots=12, dtype=jnp.float32)
    words = rng.integers(1, 64, (3, 2)).astype(np.int32)
    teacher = placed(TEACHER, 1, mesh, DECODING)
    shared: Any = dict(config=TEACHER, sharded=model.is_sharded(teacher))
    kv = gen.extend(teacher, kv, *decoding((tokens, counts)), **shared)
    scores, _ = labels.label_scores(
        teacher,
        kv,
        *decoding((np.full(ROWS, 7, np.int32), np.ones(ROWS, np.int32))),
        words,
        np.array([2, 2, 1], np.int32),
        **shared,
    )
    return np.asarray(scores)


def decoding(rows: Any) -> Any:
    return shard_batch(rows, rules=DECODING)


@cache
def on_one_device(what: Any) -> Any:
    single = make_mesh(data=1, fsdp=1, tensor=1)
    with jax.set_mesh(single):
        return what(single)


@pytest.mark.parametrize(
    ("mesh", "how"),
    [((2, 2, 1, 2), update), ((1, 2, 2, 2), update), ((1, 8, 1, 1), update_of_adapters)],
    indirect=["mesh"],
)
def test_one_update(mesh: Mesh, how: Callable[[Mesh], Any]) -> None:
    (gradient, metrics), (want, wanted) = how(mesh), on_one_device(how)
    assert max(np.abs(x).max() for x in jax.tree.leaves(want)) > 1e-3
    assert_same_tree(gradient, want, rounding=1e-5)
    for name in ("loss", "z", "grad_norm"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-5)


@pytest.mark.parametrize("mesh", [(1, 2, 1, 4)], indirect=True)
def test_the_loss_psums_over_a_sharded_vocabulary(mesh: Mesh) -> None:
    state = init_state(placed(STUDENT, 0, mesh), KEEPER, seed=0)
    rows = shard_batch(batch(), mesh)
    teacher = teacher_of(TEACHER, placed(TEACHER, 1, mesh, DECODING), rows)
    lowered = step_on(placement_of(state)).lower(state, teacher, rows, None)
    found = collectives(parse(lowered.compile().as_text()))
    of_loss = [part for part in found if "losses.py" in part.source]
    # One number or one gradient of a hidden state for each position, the gradient of a device's
    # shard of the head, and totals of weights; never logits, [positions, vocabulary], nor the head.
    chunk, width, part = 8, STUDENT.d_model, STUDENT.vocab_size // 4
    summed = {text for row in of_loss for text in re.findall(r"\[([\d,]*)\]", row.shape)}
    assert {row.kind for row in of_loss} == {"all-reduce"}
    assert {f"{chunk}", f"{chunk},{width}"} <= summed
    totals = {"", f"{batch().verdict.shape[1]}"}
    assert summed - totals <= {f"{chunk}", f"{chunk},1", f"{chunk},{width}", f"{part},{width}"}


@pytest.mark.parametrize(
    ("mesh", "how"),
    [
        *(((1, 8, 1, 1), sampled_from_shards), ((1, 2, 2, 2), sampled_from_shards)),
        *(((1, 2, 4, 1), sampled), ((2, 2, 1, 2), sampled_with_adapters)),
    ],
    indirect=["mesh"],
)
def test_one_generation(mesh: Mesh, how: Callable[[Mesh], Any]) -> None:
    reference = sampled if how is sampled_from_shards else how
    (tokens, logprobs), (want, want_logprobs) = how(mesh), on_one_device(reference)
    assert tokens == want
    np.testing.assert_allclose(logprobs, want_logprobs, rtol=1e-5, atol=1e-5)
    if how is sampled_with_adapters:
        assert want != on_one_device(sampled)[0]
    else:
        assert len({len(row) for row in want}) > 1  # some rows stopped sooner


@pytest.mark.parametrize("mesh", [(2, 2, 1, 2)], indirect=True)
def test_for_a_token_activations_are_sent_and_no_weights(mesh: Mesh) -> None:
    specs = param_specs(WIDE)
    shardings = param_shardings(specs, mesh)
    weights = jax.tree.map(
        lambda spec, where: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=where),
        specs,
        shardings,
        is_leaf=model.is_spec,
    )
    assert model.is_sharded(weights)
    kv = model.init_cache(WIDE, batch=ROWS, slots=SLOTS, dtype=jnp.float32)
    rows = decoding(np.ones(ROWS, np.int32))
    keys = jax.random.split(jax.random.key(0), ROWS)
    how = dict(sampling=Sampling(temperature=1.0, top_k=0, top_p=1.0), chunk=4)

    def largest(sharded: bool) -> int:
        """Bytes of the largest array that is sent."""
        settings = dict(config=WIDE, sharded=sharded)
        sampling = gen.generate.lower(
            *(weights, kv, rows, rows, keys, np.array([63])), **settings, **how
        )
        words = np.ones((3, 2), np.int32)  # labels of two tokens
        judging = labels.label_scores.lower(
            *(weights, kv, rows, rows, words, np.full(3, 2)), **settings
        )
        modules = [parse(lowered.compile().as_text()) for lowered in (sampling, judging)]
        return max(
            array.bytes
            for module in modules
            for computation in module.computations.values()
            for instruction in computation.values()
            if instruction.opcode in KINDS
            for array in instruction.arrays()
        )

    layers = [spec.shape[1:] for spec in specs["layers"].values() if len(spec.shape) > 2]
    least = 4 * min(map(math.prod, layers)) // mesh.shape["tensor"]
    widest = 4 * ROWS * 4 * max(WIDE.d_ff, 3 * WIDE.vocab_size // 2)
    assert largest(True) <= widest < least <= largest(False)


@pytest.mark.parametrize("mesh", [(1, 8, 1, 1)], indirect=True)
def test_in_bfloat16_partial_sums_are_not_rounded(mesh: Mesh) -> None:
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params(WIDE, 0))
    tokens = np.arange(ROWS, dtype=np.int32)[:, None]

    @partial(jax.jit, static_argnames="sharded")
    def logits(weights: Params, *, sharded: bool) -> jax.Array:
        dtype = weights["embed"].dtype
        kv = model.init_cache(WIDE, batch=ROWS, slots=1, dtype=dtype)
        one = jnp.ones(ROWS, jnp.int32)
        append = partial(model.forward_cached, config=WIDE, sharded=sharded)
        return model.logits(weights, append(weights, kv, tokens, one)[0], sharded=sharded)

    exact = logits(jax.tree.map(lambda x: x.astype(jnp.float32), low), sharded=False)
    shards = jax.device_put(low, param_shardings(param_specs(WIDE), mesh))
    want, got = logits(low, sharded=False), logits(shards, sharded=True)
    # The same roundings, except a few that depend on the order of a sum.
    assert np.abs(got - want).mean() < np.abs(want - exact).mean() / 10


@pytest.mark.parametrize("mesh", [(2, 2, 1, 2), (1, 2, 2, 2)], indirect=True)
def test_one_judging(mesh: Mesh) -> None:
    scores = judged(mesh)
    want = on_one_device(judged)
    np.testing.assert_allclose(scores, want, rtol=0, atol=1e-4)
    assert (scores.argmax(axis=1) == want.argmax(axis=1)).all()


@pytest.mark.parametrize("mesh", [(2, 2, 1, 2)], indirect=True)
def test_some_rows_read_on_their_own_devices(mesh: Mesh) -> None:
    weights = placed(STUDENT, 0, mesh)
    rng = np.random.default_rng(5)
    first = rng.integers(1, 64, (ROWS, 6)).astype(np.int32), rng.integers(1, 7, ROWS)
    # Two rows of each of four shards; one of them gets no token, another only a part.
    rows = np.array([0, 3, 5, 4, 10, 11, 15, 12], np.int32)
    tokens = rng.integers(1, 64, (len(rows), 5)).astype(np.int32)
    counts = np.array([5, 5, 0, 5, 2, 5, 5, 5], np.int32)
    shared: Any = dict(config=STUDENT, sharded=model.is_sharded(weights))

    def read(rows: np.ndarray | None, tokens: np.ndarray, counts: np.ndarray) -> Any:
        kv = model.init_cache(STUDENT, batch=ROWS, slots=SLOTS, dtype=jnp.float32)
        kv = gen.extend(weights, kv, *decoding((first[0], first[1].astype(np.int32))), **shared)
        more = decoding((tokens, counts) if rows is None else (tokens, counts, rows))
        text = gen.extend.lower(weights, kv, *more, **shared).compile().as_text()
        return gen.extend(weights, kv, *more, **shared), parse(text)

    some, module = read(rows, tokens, counts)
    place = some.keys[0].sharding
    every = np.zeros((ROWS, 5), np.int32), np.zeros(ROWS, np.int32)
    for whole, part in zip(every, (tokens, counts), strict=True):
        whole[rows] = part
    all_rows, _ = read(None, *every)
    np.testing.assert_array_equal(some.lengths, all_rows.lengths)
    filled = np.arange(SLOTS) < np.asarray(all_rows.lengths)[:, None]
    for ours, theirs in zip(
        (*some.keys, *some.values), (*all_rows.keys, *all_rows.values), strict=True
    ):
        assert ours.sharding == theirs.sharding
        ours, theirs = (np.moveaxis(np.asarray(x), 2, 1) for x in (ours, theirs))
        np.testing.assert_allclose(ours[filled], theirs[filled], rtol=1e-5, atol=2e-5)
    # At most the new keys are sent, never a part of the cache.
    files = ("model/cache.py", "model/attention.py")
    sent = [part.bytes for part in collectives(module) if part.source.startswith(files)]
    new = 4 * tokens.size * STUDENT.num_kv_heads * STUDENT.head_dim
    assert 0 < max(sent) <= new < 4 * math.prod(place.shard_shape(some.keys[0].shape))


@pytest.mark.parametrize("mesh", [(2, 2, 1, 2)], indirect=True)
def test_a_cache_that_does_not_divide_is_refused(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match=r"`batch` = 15 must be divisible.* = 4"):
        model.init_cache(STUDENT, batch=15, slots=8, dtype=jnp.float32)
