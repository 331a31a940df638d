"""Attention by kernels against the plain form. TPU kernels are interpreted on the CPU."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas.tpu import force_tpu_interpret_mode
from models import TINY, assert_same_tree

from opd_jax import model
from opd_jax.model import attention_on, kernels
from opd_jax.model.attention import attention, cached_attention
from opd_jax.model.cache import Int8Slots
from opd_jax.runtime.mesh import make_mesh


def normal(*shapes: tuple[int, ...], dtype: Any = jnp.float32) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True)]


def over_itself(*arrays: jax.Array, implementation: str) -> Any:
    """The result, and the gradient of a weighted sum of it."""

    @partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def run(q, k, v, weight):
        out = attention(q, k, v, query_chunk=64, implementation=implementation)
        return jnp.sum(out * weight), out

    return jax.device_get(jax.jit(run)(*arrays))


def sequences(B: int, T: int, N: int, G: int, H: int) -> list[jax.Array]:
    queries, keys = (B, T, N, H), (B, T, G, H)
    return normal(queries, keys, keys, queries)


def test_splash_attention_is_attention_forwards_and_backwards():
    arrays = sequences(2, 384, 6, 2, 64)
    with force_tpu_interpret_mode():
        got = over_itself(*arrays, implementation="pallas")
    assert_same_tree(got, over_itself(*arrays, implementation="plain"), rounding=5e-6)


def test_each_device_attends_to_its_own_rows_and_heads():
    arrays = sequences(4, 256, 8, 4, 64)
    # The interpreter blocks a thread for each device, and needs some of the eight besides.
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh), force_tpu_interpret_mode():
        got = over_itself(*arrays, implementation="pallas")
    assert_same_tree(got, over_itself(*arrays, implementation="plain"), rounding=5e-6)


def test_cudnn_attention_lowers_forwards_and_backwards_on_each_device(monkeypatch):
    # Only a machine with a GPU can ask cuDNN for its version.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)

    @partial(jax.grad, argnums=(0, 1, 2))
    def gradient(q, k, v):
        out = attention(q, k, v, query_chunk=64, implementation="cudnn")
        return jnp.sum(out.astype(jnp.float32))

    q, k = (jax.ShapeDtypeStruct((4, 200, heads, 64), jnp.bfloat16) for heads in (8, 4))
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        text = jax.jit(gradient).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("@__cudnn$fmhaSoftmax(", "@__cudnn$fmhaSoftmaxBackward("):
        (call,) = (line for line in text.splitlines() if name in line)
        assert "CAUSAL" in call
        taken = call.partition(" : (")[2]
        queries, keys = "tensor<1x200x4x64xbf16>", "tensor<1x200x2x64xbf16>"
        assert taken.startswith(f"{queries}, {keys}, {keys}")


def over_a_cache(*arrays: Any, implementation: str) -> jax.Array:
    slots = jnp.int32(jax.tree.leaves(arrays[1])[0].shape[2])
    run = partial(cached_attention, slots_read=slots, implementation=implementation)
    return jax.jit(run)(*arrays)


def cache_and_queries(B: int, S: int, N: int, G: int, kind: str) -> list[Any]:
    """Queries in float32, so that results are; keys and values as `kind` says."""
    q, *floats = normal((B, 1, N, 128), (B, G, S, 128), (B, G, S, 128))
    if kind == "int8":
        return [q, *(Int8Slots(*quantized(x)) for x in floats)]
    return [q, *(x.astype(kind) for x in floats)]


def quantized(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    scale = jnp.abs(x).max(axis=-1) / 127
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def as_floats(buffer: Any) -> jax.Array:
    if isinstance(buffer, Int8Slots):
        return buffer.values * buffer.scale[..., None]
    return buffer.astype(jnp.float32)


# First slot, within a block, at its end, the last slot, and behind it, where a full row is.
POSITIONS = np.array([[0], [130], [383], [767], [768], [3], [255], [256]], np.int32)


def assert_reads_what_each_row_has(q: Any, k: Any, v: Any, positions: np.ndarray) -> None:
    """The kernel's result is the plain one, and what lies behind a row's length is not read."""
    slots = jax.tree.leaves(k)[0].shape[2]
    unread = np.arange(slots) > positions[:, :, None]  # [B, 1, S]

    def spoilt(buffer: Any) -> Any:
        if isinstance(buffer, Int8Slots):
            return replace(buffer, scale=jnp.where(unread, 1e30, buffer.scale))
        return jnp.where(unread[..., None], 1e30, buffer)

    want = over_a_cache(q, as_floats(k), as_floats(v), positions, implementation="plain")
    with force_tpu_interpret_mode():
        got = over_a_cache(q, spoilt(k), spoilt(v), positions, implementation="pallas")
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("sizes", [(6, 2), (8, 1), (2, 2)])  # heads of queries, of keys
def test_a_sampled_token_reads_what_its_row_has(sizes: tuple[int, int], kind: str):
    assert_reads_what_each_row_has(*cache_and_queries(8, 768, *sizes, kind), POSITIONS)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_each_device_reads_its_own_rows_and_heads(kind: str):
    arrays = cache_and_queries(4, 256, 8, 4, kind)
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        assert_reads_what_each_row_has(*arrays, POSITIONS[[1, 0, 3, 7]] % 256)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_it_lowers_for_a_tpu_where_there_is_none(kind: str):
    # As `plan` does, on a machine that only counts.
    run = partial(cached_attention, slots_read=jnp.int32(512), implementation="pallas")
    arrays = *cache_and_queries(8, 512, 8, 4, kind), POSITIONS % 512
    lowered = jax.jit(run).trace(*arrays).lower(lowering_platforms=("tpu",))
    assert "ragged_attention" in lowered.as_text()


def test_it_rounds_as_the_plain_form_does():
    # In bfloat16 queries, and with them the probabilities, are bfloat16 in both.
    q, k, v = cache_and_queries(8, 256, 4, 2, "int8")
    arrays = q.astype(jnp.bfloat16), k, v, POSITIONS % 256
    plain = over_a_cache(*arrays, implementation="plain")
    with force_tpu_interpret_mode():
        got = over_a_cache(*arrays, implementation="pallas")
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(float), plain.astype(float), rtol=2**-7, atol=2**-9)


def test_the_forward_pass_uses_the_kernel_that_its_config_names():
    config = replace(TINY, head_dim=64)
    init = partial(model.init_params, config, dtype=jnp.float32)
    params = jax.eval_shape(init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def run(how: str) -> Any:
        forward = partial(model.forward, config=replace(config, attention=how))
        return jax.make_jaxpr(partial(forward, query_chunk=64, remat="layers"))(params, tokens)

    assert "splash_mha" in str(run("pallas"))
    assert "splash_mha" not in str(run("plain"))


@pytest.mark.parametrize(
    ("how", "shape", "dtype", "served"),
    [
        ("plain", (2, 256, 4, 2, 64), "float32", False),
        ("pallas", (2, 256, 4, 2, 64), "float32", True),
        ("pallas", (2, 200, 4, 2, 64), "float32", False),  # not whole blocks
        ("pallas", (2, 256, 4, 2, 80), "float32", False),  # size of a head
        ("pallas", (3, 256, 4, 2, 64), "float32", False),  # rows over two shards
        ("pallas", (2, 256, 3, 1, 64), "float32", False),  # heads over two shards
        ("cudnn", (2, 200, 4, 2, 64), "bfloat16", True),
        ("cudnn", (2, 200, 4, 2, 64), "float32", False),  # cuDNN has none in float32
        ("cudnn", (2, 201, 4, 2, 64), "bfloat16", False),  # an odd sequence
        ("cudnn", (2, 200, 4, 2, 256), "bfloat16", False),
        ("cudnn", (3, 200, 4, 2, 64), "bfloat16", False),
    ],
)
def test_a_kernel_serves_what_it_can(how: str, shape: tuple, dtype: str, served: bool):
    B, T, N, G, H = shape
    q, k = (jax.ShapeDtypeStruct((B, T, n, H), jnp.dtype(dtype)) for n in (N, G))
    with jax.set_mesh(make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])):
        assert (kernels.over_itself(how, q, k) is not None) == served


@pytest.mark.parametrize(
    ("how", "tokens", "slots", "head", "dtype", "served"),
    [
        ("plain", 1, 256, 128, "bfloat16", False),
        ("cudnn", 1, 256, 128, "bfloat16", False),
        ("pallas", 1, 256, 128, "bfloat16", True),
        ("pallas", 1, 256, 128, "float32", True),
        ("pallas", 2, 256, 128, "bfloat16", False),  # several new tokens
        ("pallas", 1, 200, 128, "bfloat16", False),  # not whole blocks
        ("pallas", 1, 256, 64, "bfloat16", False),  # size of a head
        ("pallas", 1, 256, 1 << 14, "bfloat16", False),  # its fast memory
    ],
)
def test_a_kernel_reads_the_caches_that_it_can(
    how: str, tokens: int, slots: int, head: int, dtype: str, served: bool
):
    q = jax.ShapeDtypeStruct((2, tokens, 4, head), jnp.dtype(dtype))
    k = jax.ShapeDtypeStruct((2, 2, slots, head), jnp.dtype(dtype))
    assert (kernels.over_a_cache(how, q, k, None) is not None) == served
    assert kernels.over_a_cache(how, q, k, jnp.arange(2)) is None  # some rows of the cache


def test_what_no_kernel_serves_is_plain_to_the_bit():
    arrays = sequences(2, 100, 4, 2, 64)
    plain = over_itself(*arrays, implementation="plain")
    for how in ("pallas", "cudnn"):
        assert_same_tree(over_itself(*arrays, implementation=how), plain, rounding=0)


def test_a_platform_has_its_kernels_and_the_setting_can_refuse_them():
    platforms = ("tpu", "gpu", "cpu")
    assert [attention_on(where, "auto") for where in platforms] == ["pallas", "plain", "plain"]
    assert {attention_on(where, "plain") for where in platforms} == {"plain"}
    assert attention_on("tpu", "pallas") == "pallas"
    with pytest.raises(ValueError, match=r"`attention` = 'pallas' is for tpu.*runs on cpu"):
        attention_on("cpu", "pallas")
