"""A cache in 8 bits: what it holds, and that attention over it is attention over that."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY

from opd_jax import model
from opd_jax.model.attention import cached_attention
from opd_jax.model.cache import Int8Slots, append, init_cache
from opd_jax.runtime.mesh import MESH_AXES, make_mesh

CONFIG = replace(TINY, num_heads=4, num_kv_heads=2, head_dim=16)
ROWS, SLOTS, NEW = 3, 24, 4
LENGTHS = np.array([5, 0, 17], np.int32)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def floats(buffer: Int8Slots) -> np.ndarray:
    """`values · scale` in float64."""
    return np.asarray(buffer.values, np.float64) * np.asarray(buffer.scale, np.float64)[..., None]


def test_an_element_moves_by_at_most_half_a_scale() -> None:
    make: Any = partial(init_cache, CONFIG, batch=ROWS, slots=SLOTS, dtype=jnp.float32)
    empty, exact = make(int8=True).keys[0], make().keys[0]
    new = normal(0, ROWS, NEW, 2, 16) * normal(1, ROWS, NEW, 2, 1)
    new[0, 1, 0] = 0  # no scale would do
    slots = LENGTHS[:, None] + np.arange(NEW)
    slots[2, 3] = SLOTS  # dropped
    buffer = append(empty, jnp.asarray(new), jnp.asarray(slots))
    want = np.asarray(append(exact, jnp.asarray(new), jnp.asarray(slots)))
    assert buffer.values.dtype == jnp.int8
    got, half = floats(buffer), np.asarray(buffer.scale)[..., None] / 2
    assert (np.abs(got - want) <= half * (1 + 1e-5)).all()
    assert np.isfinite(got).all()
    largest = np.abs(want).max(axis=-1)
    np.testing.assert_allclose(np.abs(got).max(axis=-1), largest, rtol=1e-6)


@pytest.mark.parametrize("rows", [None, (2, 0)])
def test_scales_multiply_scores_and_probabilities(rows: tuple | None) -> None:
    shape = ROWS, 2, SLOTS, 16
    keys, values = (
        Int8Slots(
            np.random.default_rng(seed).integers(-127, 128, shape).astype(np.int8),
            np.abs(normal(seed, *shape[:-1])) / 127,
        )
        for seed in (2, 3)
    )
    which = None if rows is None else jnp.asarray(rows)
    B = ROWS if rows is None else len(rows)
    q, position = normal(4, B, 2, 4, 16), np.array([[4, 5], [0, 1], [16, 17]], np.int32)[:B]
    attend = partial(cached_attention, slots_read=18, rows=which)
    got = attend(q, keys, values, position)
    plain = (jnp.asarray(floats(buffer), jnp.float32) for buffer in (keys, values))
    np.testing.assert_allclose(got, attend(q, *plain, position), rtol=0, atol=2e-6)


def test_logits_over_it_are_near_those_over_floats() -> None:
    params = model.init_params(CONFIG, jax.random.key(0), dtype=jnp.float32)
    tokens = np.random.default_rng(5).integers(0, CONFIG.vocab_size, (ROWS, 12))
    run = jax.jit(partial(model.forward_cached, config=CONFIG, sharded=False))

    def logits(int8: bool) -> np.ndarray:
        kv = init_cache(CONFIG, batch=ROWS, slots=SLOTS, dtype=jnp.float32, int8=int8)
        for piece in np.split(tokens, 3, axis=1):
            hidden, kv = run(params, kv, piece, np.full(ROWS, piece.shape[1], np.int32))
        assert (kv.slots, kv.lengths.tolist()) == (SLOTS, [12] * ROWS)
        return np.asarray(model.logits(params, hidden, sharded=False))

    want, got = logits(False), logits(True)
    assert 0 < np.std(got - want) < 0.02 * np.std(want)


def test_values_and_scales_are_sharded_alike() -> None:
    with jax.set_mesh(make_mesh(**dict(zip(MESH_AXES, (1, 2, 2, 1), strict=True)))):
        kv = init_cache(CONFIG, batch=4, slots=8, dtype=jnp.float32, int8=True)
    assert kv.keys[0].values.sharding.shard_shape((4, 2, 8, 16)) == (2, 1, 8, 16)
    assert kv.keys[0].scale.sharding.shard_shape((4, 2, 8)) == (2, 1, 8)
