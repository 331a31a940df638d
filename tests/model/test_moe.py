"""Mixtures of experts: against torch, against loops in float64, on a mesh and in int8.

That their logits are those of `transformers` is in `test_transformer.py`.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, assert_same_tree
from numpy.testing import assert_allclose, assert_array_equal
from passes import dequantized_params, logits

from opd_jax import hf, model
from opd_jax.model import Params, moe
from opd_jax.model.int8 import int8_specs, quantize_params
from opd_jax.model.moe import Experts
from opd_jax.model.projections import Int8Weight
from opd_jax.plan.collectives import collectives
from opd_jax.plan.hlo import parse
from opd_jax.runtime.mesh import (
    DECODING,
    MESH_AXES,
    TRAINING,
    make_mesh,
    param_shardings,
    shard_batch,
)

pytestmark = pytest.mark.usefixtures("compile_quickly")

EXPERTS = Experts(count=6, per_token=2, d_ff=8, normalized=True)
CONFIG = replace(TINY, num_kv_heads=4, experts=EXPERTS)

quantize = jax.jit(quantize_params, static_argnames="config")


def test_the_gradient_is_that_of_torch(references: dict) -> None:
    import torch

    folder = references["qwen3_moe"].folder
    config = hf.read_config(folder)
    params = hf.load_params(folder, config, dtype=jnp.float32)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 96, (3, 5))
    weight = rng.normal(size=(3, 5, 96)).astype(np.float32) / 100

    @jax.jit
    @jax.grad
    def gradient(params: Params) -> jax.Array:
        hidden = model.forward(params, tokens, config=config, query_chunk=8, remat="layers")
        return jnp.sum(hidden @ model.head(params) * weight)

    got = jax.tree.map(np.asarray, gradient(params)["layers"])
    network = references["qwen3_moe"].model
    network.zero_grad()
    (network(torch.tensor(tokens)).logits * torch.tensor(weight)).sum().backward()
    block = network.model.layers[1].mlp
    gate, up = np.split(block.experts.gate_up_proj.grad.numpy().transpose(0, 2, 1), 2, axis=2)
    pairs = {
        "router": block.gate.weight.grad.numpy().T,
        "expert_gate": gate,
        "expert_up": up,
        "expert_down": block.experts.down_proj.grad.numpy().transpose(0, 2, 1),
    }
    for name, want in pairs.items():
        assert_allclose(got[name][1], want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))
    network.zero_grad()


# --- One layer ------------------------------------------------------------------------------------


def silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def random_layer(rng: np.random.Generator) -> dict[str, np.ndarray]:
    E, D, F = 6, 16, 8
    shapes = {"expert_gate": (E, D, F), "expert_up": (E, D, F), "expert_down": (E, F, D)}
    layer = {name: rng.normal(size=shape) / 3 for name, shape in shapes.items()}
    return layer | {"router": rng.normal(size=(D, E))}


def by_loops(layer: dict[str, np.ndarray], x_MD: np.ndarray, experts: Experts) -> np.ndarray:
    """The layer in float64, one token and one expert at a time."""
    out = np.zeros_like(x_MD)
    for row, x in enumerate(x_MD):
        probs = np.exp(x @ layer["router"])
        probs /= probs.sum()
        chosen = np.argsort(-probs)[: experts.per_token]
        weights = probs[chosen] / (probs[chosen].sum() if experts.normalized else 1)
        for weight, e in zip(weights, chosen, strict=True):
            gate, up = x @ layer["expert_gate"][e], x @ layer["expert_up"][e]
            out[row] += weight * ((silu(gate) * up) @ layer["expert_down"][e])
    return out


apply = jax.jit(
    partial(moe.feed_forward, all_gather=True, rules=TRAINING), static_argnames="experts"
)


@pytest.mark.parametrize("per_token", [1, 2, 6])
def test_any_choice_of_experts_equals_loops(per_token: int) -> None:
    rng = np.random.default_rng(0)
    layer = random_layer(rng)
    layer["router"][:, 4] = 0  # logit 0, in the middle of the others
    experts = replace(EXPERTS, per_token=per_token, normalized=per_token == 2)
    x = rng.normal(size=(2, 5, 16))
    got = apply(layer, x.astype(np.float32), experts=experts)
    want = by_loops(layer, x.reshape(10, 16), experts).reshape(2, 5, 16)
    assert np.abs(want).max() > 0.3
    assert_allclose(got, want, rtol=0, atol=3e-6)


def test_a_token_does_not_depend_on_other_tokens() -> None:
    rng = np.random.default_rng(3)
    layer = random_layer(rng)
    x = rng.normal(size=(1, 9, 16)).astype(np.float32)
    broken = x.copy()
    broken[0, 4:] = np.nan  # as activations of padding may be
    got, want = (np.asarray(apply(layer, one, experts=EXPERTS)) for one in (broken, x))
    assert_array_equal(got[:, :4], want[:, :4])


# --- On a mesh ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params(random_params: Callable) -> Params:
    return jax.tree.map(jnp.asarray, random_params(CONFIG, seed=1))


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 32, (8, 7))


@jax.jit
def one_token(params: Params, tokens: jax.Array) -> jax.Array:
    """Hidden states of one token a row, activations sent to sharded weights."""
    kv = model.init_cache(CONFIG, batch=8, slots=8, dtype=jnp.float32)
    one = jnp.ones(8, jnp.int32)
    return model.forward_cached(params, kv, tokens, one, config=CONFIG, sharded=True)[0]


@pytest.mark.parametrize(("sizes", "int8"), [((1, 2, 2, 2), True), ((1, 8, 1, 1), False)])
def test_a_mesh_computes_what_one_device_does(
    params: Params, rows: np.ndarray, sizes: tuple[int, ...], int8: bool
) -> None:
    if int8:
        params = quantize(params, CONFIG)
    mesh = make_mesh(**dict(zip(MESH_AXES, sizes, strict=True)))
    specs = int8_specs(CONFIG) if int8 else model.param_specs(CONFIG)
    placed = jax.device_put(params, param_shardings(specs, mesh, rules=DECODING))
    part = placed["layers"]["expert_gate"]
    values = part.values if int8 else part
    assert values.addressable_shards[0].data.shape == (
        2,
        6,
        16 // sizes[1],
        8 // math.prod(sizes[2:]),
    )
    with jax.set_mesh(mesh):
        got = logits(placed, shard_batch({"tokens": rows}, mesh)["tokens"], CONFIG)
        first = shard_batch({"tokens": rows[:, :1]}, mesh, rules=DECODING)["tokens"]
        got_one = one_token(placed, first)
        sent = collectives(parse(one_token.lower(placed, first).compile().as_text()))
    for ours, want in (
        (got, logits(params, rows, CONFIG)),
        (got_one, one_token(params, rows[:, :1])),
    ):
        assert_allclose(ours, want, rtol=0, atol=3e-6 * np.abs(want).max())
    # For a token no weights are sent: they would be arrays over the 6 experts.
    assert sent
    assert not [part for part in sent if re.search(r"\[(\d,)?6,\d+,\d+\]", part.shape)]


def test_rows_that_do_not_divide_over_a_mesh_are_replicated(
    params: Params, rows: np.ndarray
) -> None:
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    placed = jax.device_put(params, param_shardings(model.param_specs(CONFIG), mesh))
    with jax.set_mesh(mesh):
        got = logits(placed, rows[:3], CONFIG)
    want = logits(params, rows, CONFIG)[:3]
    assert_allclose(got, want, rtol=0, atol=3e-6 * np.abs(want).max())


def test_a_mesh_gives_the_gradient_of_one_device(params: Params, rows: np.ndarray) -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    weight = np.random.default_rng(5).normal(size=(8, 7, 32)).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(params: Params, tokens: jax.Array) -> jax.Array:
        hidden = model.forward(params, tokens, config=CONFIG, query_chunk=8, remat="layers")
        return jnp.sum(hidden @ model.head(params) * weight)

    placed = jax.device_put(params, param_shardings(model.param_specs(CONFIG), mesh))
    with jax.set_mesh(mesh):
        got = gradient(placed, shard_batch({"tokens": rows}, mesh)["tokens"])
    want = gradient(params, rows)
    assert all(np.any(x) for x in jax.tree.leaves(want))
    assert_same_tree(got, want, rounding=1e-5)


# --- In int8 --------------------------------------------------------------------------------------


def test_experts_have_a_scale_for_each_of_their_output_channels(
    params: Params, rows: np.ndarray
) -> None:
    int8 = quantize(params, CONFIG)
    quantized = {key for key, leaf in int8["layers"].items() if isinstance(leaf, Int8Weight)}
    assert quantized == {*"qkvo", "expert_gate", "expert_up", "expert_down"}  # not the router
    gate, down = int8["layers"]["expert_gate"], int8["layers"]["expert_down"]
    assert gate.scale.shape == (2, 6, 8)
    assert down.scale.shape == (2, 6, 16)
    largest = np.abs(params["layers"]["expert_down"]).max(axis=2)
    assert_allclose(down.scale, largest / 127, rtol=1e-6)
    got = logits(int8, rows, CONFIG)
    want = logits(dequantized_params(int8, CONFIG), rows, CONFIG)
    assert_allclose(got, want, rtol=0, atol=3e-6 * np.abs(want).max())
