"""`fused_divergence` of split heads: automatic and explicit sharding, and `shard_map`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax.losses import fused_divergence, fused_scores

pytestmark = pytest.mark.usefixtures("compile_quickly")

N, D, D_TEACHER, V = 18, 8, 12, 32
RNG = np.random.default_rng(0)
ARRAYS = [
    RNG.normal(size=shape).astype(np.float32)
    for shape in ((N, D), (D, V), (N, D_TEACHER), (D_TEACHER, V))
]
TARGETS = jnp.asarray(RNG.integers(V, size=N))
TOKEN_WEIGHT = RNG.random(N).astype(np.float32)
# How each array lies on a mesh of (data, tensor): the vocabulary is split.
SPLIT = (P("data"), P(None, "tensor"), P("data"), P(None, "tensor"))
KINDS = pytest.mark.parametrize(
    ("kind", "beta"), [("reverse_kl", None), ("forward_kl", None), ("jsd", 0.3)]
)


def make_mesh(axis_type: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(axis_type,) * 2)


def value_and_gradient(divergence, arrays) -> tuple[jax.Array, jax.Array, tuple]:
    """Σ weight · divergence, the teacher's top-1 probabilities, the gradient to the student."""

    def loss(h_s: jax.Array, w_s: jax.Array) -> tuple[jax.Array, jax.Array]:
        each, top1 = divergence(h_s, w_s, *arrays[2:])
        return jnp.sum(TOKEN_WEIGHT * each), top1

    (value, top1), gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        *arrays[:2]
    )
    return value, top1, gradient


def assert_same(got, want) -> None:
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@KINDS
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_global_arrays_of_any_sharding(kind: str, beta: float | None, axis_type: AxisType) -> None:
    divergence = partial(fused_divergence, kind=kind, beta=beta, chunk_size=6)
    want = value_and_gradient(divergence, ARRAYS)
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        split = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(ARRAYS, SPLIT, strict=True)
        ]
        assert_same(value_and_gradient(divergence, split), want)


@KINDS
def test_each_device_with_its_part_of_the_vocabulary(kind: str, beta: float | None) -> None:
    whole = partial(fused_divergence, kind=kind, beta=beta, chunk_size=5)
    parts = jax.shard_map(
        partial(whole, axis_name="tensor"),
        mesh=make_mesh(AxisType.Auto),
        in_specs=SPLIT,
        out_specs=P("data"),
    )
    assert_same(value_and_gradient(parts, ARRAYS), value_and_gradient(whole, ARRAYS))


def test_every_score_of_a_part_of_the_vocabulary() -> None:
    how = dict(kind="sampled_reverse_kl", chunk_size=5, confidence_temperature=0.5)
    parts = jax.shard_map(
        partial(fused_scores, **how, axis_name="tensor"),
        mesh=make_mesh(AxisType.Auto),
        in_specs=(*SPLIT, P("data")),
        out_specs=P("data"),
    )
    assert_same(parts(*ARRAYS, TARGETS), fused_scores(*ARRAYS, TARGETS, **how))


def test_a_token_that_the_teacher_bans_in_one_part() -> None:
    head = jnp.where(jnp.arange(V) == V - 1, -jnp.inf, jnp.zeros((D_TEACHER, V)))
    banned = [*ARRAYS[:2], jnp.ones((N, D_TEACHER)), head]
    parts = jax.shard_map(
        # No chunk is padded: a hidden state of zeros times −∞ would be NaN.
        partial(fused_divergence, kind="reverse_kl", chunk_size=3, axis_name="tensor"),
        mesh=make_mesh(AxisType.Auto),
        in_specs=SPLIT,
        out_specs=P("data"),
    )
    value, _, gradient = value_and_gradient(parts, banned)
    assert value == jnp.inf
    assert all(np.isfinite(g).all() for g in gradient)


def test_a_part_of_the_vocabulary_is_not_taken_for_the_whole() -> None:
    parts = jax.shard_map(
        partial(fused_divergence, kind="reverse_kl", chunk_size=5),
        mesh=make_mesh(AxisType.Auto),
        in_specs=SPLIT,
        out_specs=P("data"),
    )
    with pytest.raises(ValueError, match=r"axis tensor .* give that axis as `axis_name`"):
        parts(*ARRAYS)


def test_data_parallel_heads_need_no_axis() -> None:
    specs = (P("data"), P(), P("data"), P())
    divergence = partial(fused_divergence, kind="reverse_kl", chunk_size=5)
    shards = jax.shard_map(
        divergence, mesh=make_mesh(AxisType.Auto), in_specs=specs, out_specs=P("data")
    )
    assert_same(shards(*ARRAYS), divergence(*ARRAYS))
