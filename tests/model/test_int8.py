"""Int8 weights: what rounding does to them, and that everything runs with them as with floats."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from models import TINY, assert_same_tree
from numpy.testing import assert_allclose, assert_array_equal
from passes import cached_logits, dequantized, dequantized_params, logits
from scipy.special import log_softmax
from updates import teacher_of, two_turns

from opd_jax import hf, model
from opd_jax.model import Params
from opd_jax.model.int8 import int8_specs, quantize_params, quantize_weight
from opd_jax.model.projections import Int8Weight, project
from opd_jax.runtime.mesh import make_mesh, param_shardings, shard_batch

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIG = replace(TINY, qkv_bias=True)

quantize = jax.jit(quantize_weight, static_argnames="contracted")
quantize_all = jax.jit(quantize_params, static_argnames="config")


@pytest.fixture(scope="module")
def int8(random_params: Callable) -> Params:
    return quantize_all(jax.tree.map(jnp.asarray, random_params(CONFIG, seed=1)), CONFIG)


# --- A weight -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("shape", "contracted"), [((7, 5), (0,)), ((3, 6, 2, 4), (1,)), ((3, 2, 4, 6), (1, 2))]
)
def test_no_element_moves_by_more_than_half_a_step(
    shape: tuple[int, ...], contracted: tuple[int, ...], dtype: Any
) -> None:
    rng = np.random.default_rng(0)
    # Channels of very different size, as those of real models are.
    weight = (rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 3, shape[-1])).astype(dtype)
    got = quantize(weight, contracted=contracted)
    assert got.values.dtype == np.int8
    assert got.scale.dtype == np.float32
    assert got.scale.shape == tuple(n for axis, n in enumerate(shape) if axis not in contracted)
    # The largest of each channel takes the last step, so no step could be smaller.
    assert_array_equal(np.abs(np.asarray(got.values, int)).max(axis=contracted), 127)
    error = np.abs(dequantized(got, contracted) - weight.astype(np.float64))
    half = np.expand_dims(np.asarray(got.scale, np.float64), contracted) / 2
    assert (error <= half * (1 + 1e-5)).all()  # a quotient of 127 is rounded by 127 · 2^-24


@pytest.mark.parametrize("tiny", [0.0, 1e-42])
def test_a_channel_of_zeros_stays_zero(tiny: float) -> None:
    weight = np.array([[0.0, tiny, 3.0], [0.0, -tiny, 1.0]], np.float32)
    got = quantize(weight, contracted=(0,))
    assert (np.asarray(got.scale) > 0).all()
    assert_array_equal(np.asarray(got.values)[:, :2], 0)
    out = project(jnp.full((1, 2), 1e30), got, "td,df->tf")
    assert_array_equal(np.asarray(out)[0, :2], 0)
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("spec", "shape", "contracted"),
    [("btd,dnh->btnh", (16, 3, 4), (0,)), ("btnh,nhd->btd", (4, 4, 12), (0, 1))],
)
def test_a_projection_multiplies_by_the_dequantized_weight(
    spec: str, shape: tuple[int, ...], contracted: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    weight = quantize(rng.normal(size=shape).astype(np.float32), contracted=contracted)
    x = rng.normal(size=(2, 5, *(shape[axis] for axis in contracted))).astype(np.float32)
    want = np.einsum(spec, x.astype(np.float64), dequantized(weight, contracted))
    got = project(jnp.asarray(x), weight, spec)
    assert got.dtype == jnp.float32
    # 16 products of float32, and values up to 10.
    assert_allclose(got, want, rtol=0, atol=1e-5)
    low = project(jnp.asarray(x, jnp.bfloat16), weight, spec)
    assert low.dtype == jnp.bfloat16
    # The sum and the scaled sum are each rounded to 8 bits, by up to 2^-8.
    exact = np.einsum(
        spec, x.astype(ml_dtypes.bfloat16).astype(float), dequantized(weight, contracted)
    )
    assert_allclose(np.asarray(low, np.float64), exact, rtol=2 * 2.0**-8)


# --- A model --------------------------------------------------------------------------------------


def test_the_projections_of_the_layers_are_quantized_as_the_specs_say(int8: Params) -> None:
    specs = int8_specs(CONFIG)
    shapes = jax.tree.map(lambda spec: spec.shape, specs, is_leaf=model.is_spec)
    assert jax.tree.map(lambda x: x.shape, int8) == shapes
    quantized = {key for key, leaf in int8["layers"].items() if isinstance(leaf, Int8Weight)}
    assert quantized == {*"qkvo", "gate", "up", "down"}
    others = {key: leaf for key, leaf in int8["layers"].items() if key not in quantized}
    assert {x.dtype.name for x in (*others.values(), int8["embed"], int8["head"])} == {"float32"}
    q, o = specs["layers"]["q"], specs["layers"]["o"]
    assert q.values.axes == ("layer", "embed", "heads", "head_dim")
    assert (q.scale.axes, q.scale.shape) == (("layer", "heads", "head_dim"), (2, 4, 8))
    assert (o.scale.axes, o.scale.shape) == (("layer", "embed"), (2, 16))


def test_both_passes_use_the_dequantized_weights(int8: Params) -> None:
    tokens = np.random.default_rng(0).integers(0, 32, (3, 11))
    want = logits(dequantized_params(int8, CONFIG), tokens, CONFIG)
    assert np.abs(want).max() > 1
    tolerance = 2e-6 * np.abs(want).max()
    assert_allclose(logits(int8, tokens, CONFIG), want, rtol=0, atol=tolerance)
    pieces = [[4] * 3, [4] * 3, [3] * 3]
    cached = cached_logits(int8, tokens, CONFIG, pieces=pieces)
    assert_allclose(cached, want, rtol=0, atol=tolerance)


def test_int8_is_near_bfloat16_on_random_models(random_params: Callable) -> None:
    tokens = np.random.default_rng(1).integers(0, 32, (16, 32))
    for seed in range(3):
        low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_params(CONFIG, seed=seed))
        want, got = (logits(p, tokens, CONFIG) for p in (low, quantize_all(low, CONFIG)))
        assert want.std() > 1  # else nearness would say little
        log_p, log_q = (log_softmax(x.astype(np.float64), axis=-1) for x in (want, got))
        # Found: 96.1 to 97.5 %, 0.0006 to 0.0011. From float32 to bfloat16 alone it is 97.1 to
        # 99.0 %, 0.0002 to 0.0005. A bit less would be four times the divergence.
        assert np.mean(log_p.argmax(-1) == log_q.argmax(-1)) >= 0.94
        assert np.sum(np.exp(log_p) * (log_p - log_q), axis=-1).mean() <= 0.002


@pytest.mark.parametrize(
    ("name", "sizes"), [("qwen3", None), ("qwen3", (1, 4, 2)), ("qwen3_moe", (2, 2, 2))]
)
def test_a_folder_is_loaded_as_int8_shards(references: dict, name: str, sizes: Any) -> None:
    folder = references[name].folder
    config = hf.read_config(folder)
    low = hf.load_params(folder, config, dtype=jnp.bfloat16)
    want = quantize_all(low, config)
    mesh = sizes and make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    got = hf.load_params(folder, config, dtype=jnp.bfloat16, int8=True, mesh=mesh)
    # A scale is that of a whole channel, though each device holds a shard: equal to the last bit.
    jax.tree.map(assert_array_equal, got, want)
    if sizes:
        placed = jax.tree.map(lambda leaf: leaf.sharding, got)
        assert placed == param_shardings(int8_specs(config), mesh)
        q = got["layers"]["q"]
        assert q.values.addressable_shards[0].data.shape == (2, 32 // sizes[1], 4 // sizes[2], 16)
        assert q.scale.addressable_shards[0].data.shape == (2, 4 // sizes[2], 16)


# --- As a teacher ---------------------------------------------------------------------------------


def test_the_teachers_pass_uses_the_dequantized_weights_on_one_device_and_on_eight(
    int8: Params,
) -> None:
    rows = two_turns(4, vocab=32)
    want = teacher_of(CONFIG, dequantized_params(int8, CONFIG), rows).hidden
    assert_same_tree(teacher_of(CONFIG, int8, rows).hidden, want, rounding=5e-6)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(int8, param_shardings(int8_specs(CONFIG), mesh))
    with jax.set_mesh(mesh):
        sharded = teacher_of(CONFIG, placed, shard_batch(rows)).hidden
    assert_same_tree(sharded, want, rounding=5e-6)
