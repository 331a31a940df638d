"""Int8 weights: what rounding does to them, and that everything runs with them as with floats."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from models import TINY
from numpy.testing import assert_allclose, assert_array_equal
from objectives import SAGE
from scipy.special import log_softmax

from opd_jax import hf, model
from opd_jax.learner.batch import Batch
from opd_jax.learner.train_state import init_state, placement_of
from opd_jax.learner.train_step import make_train_step
from opd_jax.losses import NO_TURN
from opd_jax.model import ModelConfig, Params
from opd_jax.model.int8 import contracted_axes, int8_specs, quantize_params, quantize_weight
from opd_jax.model.projections import Int8Weight, project
from opd_jax.runtime.mesh import make_mesh, param_shardings, shard_batch

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIG = replace(TINY, qkv_bias=True)

quantize = jax.jit(quantize_weight, static_argnames="contracted")
quantize_all = jax.jit(quantize_params, static_argnames="config")


@pytest.fixture(scope="module")
def params(random_params: Callable) -> Params:
    return jax.tree.map(jnp.asarray, random_params(CONFIG, seed=1))


@pytest.fixture(scope="module")
def int8(params: Params) -> Params:
    return quantize_all(params, CONFIG)


def floats(weight: Int8Weight, contracted: tuple[int, ...], dtype: Any = np.float64) -> np.ndarray:
    """The weight that `values · scale` stands for."""
    scale = np.expand_dims(np.asarray(weight.scale, np.float64), contracted)
    return (np.asarray(weight.values, np.float64) * scale).astype(dtype)


def dequantized(params: Params, config: ModelConfig = CONFIG) -> Params:
    """Float32 parameters with the same values."""
    specs = model.param_specs(config)["layers"]
    layers = {
        key: jnp.asarray(floats(weight, contracted_axes(key, specs[key]), np.float32))
        if isinstance(weight, Int8Weight)
        else weight
        for key, weight in params["layers"].items()
    }
    return params | {"layers": layers}


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
    error = np.abs(floats(got, contracted) - weight.astype(np.float64))
    half = np.expand_dims(np.asarray(got.scale, np.float64), contracted) / 2
    assert (error <= half * (1 + 1e-5)).all()  # a quotient of 127 is rounded by 127 · 2^-24


def test_scales_by_hand() -> None:
    weight = np.array([[1.27, -2.0, 0.5], [-0.64, 1.0, -63.5]], np.float32)
    by_column = quantize(weight, contracted=(0,))
    assert_allclose(by_column.scale, [0.01, 2 / 127, 0.5], rtol=1e-6)
    # 1 / (2 / 127) = 63.5 and 0.5 / 0.5 = 1; a half goes to the even neighbour.
    assert_array_equal(by_column.values, [[127, -127, 1], [-64, 64, -127]])
    by_row = quantize(weight, contracted=(1,))
    assert_allclose(by_row.scale, [2 / 127, 0.5], rtol=1e-6)
    assert_array_equal(by_row.values, [[81, -127, 32], [-1, 2, -127]])


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
    [
        ("btd,df->btf", (16, 12), (0,)),
        ("btd,dnh->btnh", (16, 3, 4), (0,)),
        ("btnh,nhd->btd", (4, 4, 12), (0, 1)),
    ],
)
def test_a_projection_is_that_of_the_weights_it_stands_for(
    spec: str, shape: tuple[int, ...], contracted: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    weight = quantize(rng.normal(size=shape).astype(np.float32), contracted=contracted)
    x = rng.normal(size=(2, 5, *(shape[axis] for axis in contracted))).astype(np.float32)
    want = np.einsum(spec, x.astype(np.float64), floats(weight, contracted))
    got = project(jnp.asarray(x), weight, spec)
    assert got.dtype == jnp.float32
    # 16 products of float32, and values up to 10.
    assert_allclose(got, want, rtol=0, atol=1e-5)
    low = project(jnp.asarray(x, jnp.bfloat16), weight, spec)
    assert low.dtype == jnp.bfloat16
    # The sum and the scaled sum are each rounded to 8 bits, by up to 2^-8.
    exact = np.einsum(spec, x.astype(ml_dtypes.bfloat16).astype(float), floats(weight, contracted))
    assert_allclose(np.asarray(low, np.float64), exact, rtol=2 * 2.0**-8)


# --- A model --------------------------------------------------------------------------------------


def run(params: Params, tokens: np.ndarray, config: ModelConfig = CONFIG) -> np.ndarray:
    forward = jax.jit(partial(model.forward, config=config, query_chunk=8, remat="none"))
    logits = forward(params, tokens) @ model.head(params)
    return np.asarray(logits, np.float64)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 32, (3, 11))


def test_every_projection_of_the_layers_is_quantized_and_nothing_else(int8: Params) -> None:
    kinds = {key: isinstance(leaf, Int8Weight) for key, leaf in int8["layers"].items()}
    assert {key for key, quantized in kinds.items() if quantized} == {*"qkvo", "gate", "up", "down"}
    assert {leaf.dtype.name for key, leaf in int8["layers"].items() if not kinds[key]} == {
        "float32"
    }
    assert int8["embed"].dtype == int8["head"].dtype == jnp.float32


def test_forward_is_that_of_the_weights_it_stands_for(int8: Params, tokens: np.ndarray) -> None:
    got, want = run(int8, tokens), run(dequantized(int8), tokens)
    assert np.abs(want).max() > 1
    assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_the_cache_sees_the_same_weights(int8: Params, tokens: np.ndarray) -> None:
    cache = model.init_cache(CONFIG, batch=3, slots=16, dtype=jnp.float32, layout="BGSH")
    append = jax.jit(partial(model.forward_cached, config=CONFIG, sharded=False))
    pieces = []
    for start, stop in ((0, 4), (4, 8), (8, 11)):
        piece = np.zeros((3, 4), np.int32)
        piece[:, : stop - start] = tokens[:, start:stop]
        hidden, cache = append(int8, cache, piece, np.full(3, stop - start, np.int32))
        pieces.append(np.asarray(hidden)[:, : stop - start])
    got = np.concatenate(pieces, axis=1) @ np.asarray(model.head(int8))
    want = run(int8, tokens)
    assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_specs_are_those_of_the_quantized_parameters(int8: Params) -> None:
    specs = int8_specs(CONFIG)
    shapes = jax.tree.map(lambda spec: spec.shape, specs, is_leaf=model.is_spec)
    assert jax.tree.map(lambda x: x.shape, int8) == shapes
    q, o = specs["layers"]["q"], specs["layers"]["o"]
    assert q.values.axes == ("layer", "embed", "heads", "head_dim")
    assert (q.scale.axes, q.scale.shape) == (("layer", "heads", "head_dim"), (2, 4, 8))
    assert (o.scale.axes, o.scale.shape) == (("layer", "embed"), (2, 16))


def test_bytes_of_a_large_teacher_are_what_arithmetic_says() -> None:
    qwen3_32b = replace(
        CONFIG,
        vocab_size=151_936,
        d_model=5120,
        num_layers=64,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        d_ff=25_600,
        qkv_bias=False,
    )
    low = jax.eval_shape(
        partial(model.init_params, qwen3_32b, dtype=jnp.bfloat16), jax.random.key(0)
    )
    tree = jax.eval_shape(partial(quantize_params, config=qwen3_32b), low)
    attention = 5120 * 64 * 128 * 2 + 5120 * 8 * 128 * 2  # q and o, k and v
    weights = 64 * (attention + 3 * 5120 * 25_600)
    channels = 64 * ((64 + 8 + 8) * 128 + 5120 + 2 * 25_600 + 5120)  # q k v, o, gate and up, down
    embedded = 2 * 151_936 * 5120  # embedding and head
    norms = 64 * (2 * 5120 + 2 * 128) + 5120
    want = weights + 4 * channels + 2 * (embedded + norms)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) == want
    before = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(low))
    assert before == 2 * (weights + embedded + norms)
    assert (round(before / 1e9, 1), round(want / 1e9, 1)) == (65.5, 34.3)


# --- What quantization costs ----------------------------------------------------------------------


def agreement(want: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """(share of positions with the same first choice, mean KL in nats) of two arrays of logits."""
    log_p, log_q = log_softmax(want, axis=-1), log_softmax(got, axis=-1)
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    return float(np.mean(log_p.argmax(-1) == log_q.argmax(-1))), float(kl.mean())


def test_int8_is_near_bfloat16_on_random_models(random_params: Callable) -> None:
    tokens = np.random.default_rng(1).integers(0, 32, (16, 32))
    for seed in range(3):
        low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_params(CONFIG, seed=seed))
        want = run(low, tokens)
        assert want.std() > 1  # else nearness would say little
        same, kl = agreement(want, run(quantize_all(low, CONFIG), tokens))
        # Found: 96.1 to 97.5 %, 0.0006 to 0.0011. From float32 to bfloat16 alone it is 97.1 to
        # 99.0 %, 0.0002 to 0.0005. A bit less would be four times the divergence.
        assert same >= 0.94
        assert kl <= 0.002


# --- Read from a folder ---------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [None, (1, 4, 2), (2, 2, 2)])
def test_a_folder_is_read_into_int8_wherever_it_will_live(references: dict, sizes: Any) -> None:
    folder = references["qwen3"].folder
    config = hf.read_config(folder)
    low = hf.load_params(folder, config, dtype=jnp.bfloat16)
    want = quantize_all(low, config)
    mesh = sizes and make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    got = hf.load_params(folder, config, dtype=jnp.bfloat16, int8=True, mesh=mesh)
    # A scale is that of a whole channel, though each device holds a part: equal to the last bit.
    jax.tree.map(assert_array_equal, got, want)
    if sizes:
        placed = jax.tree.map(lambda leaf: leaf.sharding, got)
        assert placed == param_shardings(int8_specs(config), mesh)
        q = got["layers"]["q"]
        assert q.values.addressable_shards[0].data.shape == (2, 32 // sizes[1], 4 // sizes[2], 16)
        assert q.scale.addressable_shards[0].data.shape == (2, 4 // sizes[2], 16)


# --- As a teacher ---------------------------------------------------------------------------------

OBJECTIVE = replace(SAGE, intervention=False)


def batch() -> Batch:
    rng = np.random.default_rng(2)
    turn_id = np.where(rng.random((4, 12)) < 0.5, 0, NO_TURN).astype(np.int32)
    turn_id[:, :2] = NO_TURN, 0
    response = [np.flatnonzero(row == 0) for row in turn_id]
    return Batch(
        tokens=rng.integers(0, 32, (4, 12)).astype(np.int32),
        turn_id=turn_id,
        sampled_logprobs=np.full((4, 12), -1.5, np.float32),
        verdict=np.ones((4, 1), np.int32),
        response=np.array([np.pad(r, (0, 12 - len(r)), constant_values=12) for r in response]),
    )


def updated(student: Params, teacher: Params, mesh: Any = None) -> tuple[Params, float]:
    """(gradient, loss) of one update."""
    optimizer = optax.chain(optax.trace(decay=0.0), optax.scale(-1.0))  # keeps the gradient itself
    rows = batch()
    if mesh is not None:
        student = jax.device_put(student, param_shardings(model.param_specs(CONFIG), mesh))
        rows = shard_batch(rows, mesh)
    state = init_state(student, optimizer, seed=0)
    step = make_train_step(
        student=CONFIG,
        teacher=CONFIG,
        objective=OBJECTIVE,
        optimizer=optimizer,
        placement=placement_of(state) if mesh is not None else None,
        micro_batches=1,
        batch_rows=None,
        dtype=jnp.dtype("float32"),
        query_chunk=16,
        loss_chunk=8,
        remat="none",
    )
    state, metrics = jax.device_get(step(state, teacher, rows))
    return state.opt_state[0].trace, metrics["loss"]


def assert_near(got: Params, want: Params, rounding: float) -> None:
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert_allclose(x, y, rtol=0, atol=rounding * np.abs(y).max(), err_msg=name)


def test_an_update_from_an_int8_teacher(random_params: Callable, int8: Params) -> None:
    student = jax.tree.map(jnp.asarray, random_params(CONFIG, seed=3))
    copy = partial(jax.tree.map, jnp.array)  # an update donates the student
    gradient, loss = updated(copy(student), int8)
    assert loss > 0.1
    # The student learns from the very distributions that the dequantized teacher has.
    same, same_loss = updated(copy(student), dequantized(int8))
    assert_allclose(loss, same_loss, rtol=1e-5)
    assert_near(gradient, same, 1e-5)
    # On eight devices, parts of values and scales on each.
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(int8, param_shardings(int8_specs(CONFIG), mesh))
    with jax.set_mesh(mesh):
        sharded, sharded_loss = updated(copy(student), placed, mesh)
    assert_allclose(sharded_loss, loss, rtol=1e-5)
    assert_near(sharded, gradient, 1e-5)
