"""FLOPs of traced programs against hand arithmetic."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec
from models import TINY

from opd_jax.losses import fused_loss, fused_scores
from opd_jax.model import forward, init_params
from opd_jax.model.attention import attention, cached_attention
from opd_jax.plan.jaxpr_flops import count_flops

QWEN = replace(TINY, vocab_size=96, num_layers=3, tied=True)


def flops(function, *shapes, while_trips=()):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_flops(jax.make_jaxpr(function)(*args), while_trips=while_trips)


def test_a_product_multiplies_and_adds_once_for_each_pair():
    assert flops(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert flops(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (2, 3, 5), (2, 7, 5)) == 420
    assert flops(lambda a: a + 1, (3, 5)) == 0


def test_loops_multiply_and_nested_loops_multiply_twice():
    def once(x, _):
        return x @ x, None

    def twice(x, _):
        return jax.lax.scan(once, x, None, length=4)[0], None

    assert flops(lambda x: jax.lax.scan(twice, x, None, length=6)[0], (3, 3)) == 6 * 4 * 54


def test_a_while_loop_with_products_needs_its_trips():
    def loop(x):
        return jax.lax.while_loop(lambda c: jnp.all(c < 9), lambda c: c @ c, x)

    assert flops(loop, (3, 3), while_trips=[7]) == 7 * 54
    with pytest.raises(ValueError, match="`while_trips`"):
        flops(loop, (3, 3))
    assert flops(lambda x: jax.lax.while_loop(jnp.any, lambda c: c - 1, x), (3,)) == 0
    # Those inside it have trips of their own; 2.5 is a mean.
    twice = [
        lambda x: loop(loop(x)),
        lambda x: jax.lax.while_loop(jnp.any, loop, x),
    ]
    assert [flops(f, (3, 3), while_trips=[4, 2.5]) for f in twice] == [8 * 54, 10 * 54]


def test_the_most_expensive_branch_counts():
    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert flops(branches, (3, 3)) == 2 * 54


def test_rematerialization_and_derivatives_count():
    def loss(x, w):
        return jnp.sum(jax.checkpoint(jax.jit(lambda x, w: jnp.tanh(x @ w)))(x, w))

    # The product, the same again in the backward pass, and two products of the gradient.
    assert flops(jax.grad(loss, argnums=(0, 1)), (3, 5), (5, 7)) == 4 * 210

    @jax.custom_vjp
    def square(x):
        return x @ x

    square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x,))
    assert flops(square, (3, 3)) == 54


def test_a_loss_of_known_weights_takes_four_products_with_heads_instead_of_six():
    N, D, DT, V = 8, 3, 5, 7
    student, teacher = 2 * N * D * V, 2 * N * DT * V
    how = dict(kind="reverse_kl", chunk_size=2, confidence_temperature=1.0)

    def two_sweeps(*heads):
        return jnp.sum(fused_scores(*heads, None, **how).divergence)

    def one_sweep(*heads):
        return fused_loss(*heads, None, jnp.ones(N), **how)[0]

    heads = (N, D), (D, V), (N, DT), (DT, V)
    both = dict(argnums=(0, 1))
    assert flops(jax.grad(two_sweeps, **both), *heads) == 4 * student + 2 * teacher
    assert flops(jax.grad(one_sweep, **both), *heads) == 3 * student + teacher
    # The head of a student with adapters is not trained, and without a gradient nothing is.
    assert flops(jax.grad(one_sweep), *heads) == 2 * student + teacher
    assert flops(one_sweep, *heads) == student + teacher


def test_a_grouped_product_multiplies_each_row_by_one_matrix():
    def experts(x, w):
        return jax.lax.ragged_dot(x, w, jnp.array([2, 3], jnp.int32))

    one = 2 * 5 * 4 * 7
    assert flops(experts, (5, 4), (2, 4, 7)) == one

    def loss(x, w):
        return jnp.sum(experts(x, w) ** 2)

    assert flops(jax.grad(loss, argnums=(0, 1)), (5, 4), (2, 4, 7)) == 3 * one


def test_the_work_of_one_device_counts_for_all_of_them():
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=auto, devices=jax.devices()[:8])
    halves = PartitionSpec("a")
    split = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=halves, out_specs=halves)
    assert flops(split, (8, 3)) == 8 * (2 * 2 * 3 * 2)


def test_a_kernel_counts_at_each_point_of_its_grid():
    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    def run(x, y):
        shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
        return pl.pallas_call(kernel, out_shape=shape, grid=(5,))(x, y)

    assert flops(run, (8, 8), (8, 8)) == 5 * 2 * 8**3


def test_splash_attention_counts_the_blocks_that_a_causal_mask_leaves():
    def attend(q, k, v):
        return attention(q, k, v, query_chunk=512, implementation="pallas")

    def loss(q, k, v):
        return jnp.sum(attend(q, k, v))

    B, T, N, G, H = 2, 2048, 4, 2, 64
    shapes = (B, T, N, H), (B, T, G, H), (B, T, G, H)
    product = 2 * B * N * H * 512**2 * (1 + 2 + 3 + 4)  # four blocks of queries
    assert flops(attend, *shapes) == 2 * product
    # Scores and their gradient are formed twice: for keys and values, and for queries. Each query
    # is once multiplied with its own gradient.
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    assert flops(gradient, *shapes) == (2 + 4 + 3) * product + 2 * B * N * T * H


def test_cudnn_attention_counts_the_pairs_that_a_causal_mask_leaves(monkeypatch):
    # Only a machine with a GPU can ask cuDNN for its version.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)

    def loss(q, k, v):
        q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
        return jnp.sum(attention(q, k, v, query_chunk=6, implementation="cudnn"))

    B, T, N, G, H = 2, 6, 4, 2, 8
    shapes = (B, T, N, H), (B, T, G, H), (B, T, G, H)
    product = 2 * B * N * H * 21
    assert flops(loss, *shapes) == 2 * product
    assert flops(jax.grad(loss, argnums=(0, 1, 2)), *shapes) == (2 + 5) * product


@pytest.mark.parametrize("how", ["plain", "pallas"])
def test_reading_a_cache_counts_the_slots_that_are_read(how: str):
    def read(q, k, v):
        q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
        position = jnp.zeros((B, 1), jnp.int32)
        slots = jnp.int32(S)
        return cached_attention(q, k, v, position, slots_read=slots, implementation=how)

    B, S, N, G, H = 3, 1024, 4, 2, 128
    shapes = (B, 1, N, H), (B, G, S, H), (B, G, S, H)
    # 2.5 blocks of 128 slots, with a product for scores and one for values.
    assert flops(read, *shapes, while_trips=[2.5]) == 2 * 2 * B * N * H * 320


def test_a_forward_pass_is_its_weights_and_its_attention():
    c, B, T, chunk = QWEN, 2, 6, 2
    params = jax.eval_shape(lambda: init_params(c, jax.random.key(0), dtype=jnp.float32))
    traced = jax.make_jaxpr(lambda p, t: forward(p, t, config=c, query_chunk=chunk, remat="none"))(
        params, jax.ShapeDtypeStruct((B, T), jnp.int32)
    )
    heads = c.num_heads * c.head_dim
    projections = c.d_model * (2 * heads + 2 * c.num_kv_heads * c.head_dim)
    weights = projections + 3 * c.d_model * c.d_ff
    # Each chunk of queries sees the keys up to its own end; scores and values are a product each.
    pairs = sum(chunk * end for end in range(chunk, T + 1, chunk))
    expected = c.num_layers * (2 * B * T * weights + 2 * 2 * B * pairs * heads)
    assert count_flops(traced) == expected
