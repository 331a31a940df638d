"""Attention by kernels against the plain form. TPU kernels are interpreted on the CPU."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.tpu import force_tpu_interpret_mode
from models import TINY, assert_same_tree

from opd_jax import model
from opd_jax.model import attention_on, kernels
from opd_jax.model.attention import attention
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
        ("cudnn", (2, 200, 4, 2, 256), "bfloat16", False),
        ("cudnn", (3, 200, 4, 2, 64), "bfloat16", False),
    ],
)
def test_a_kernel_serves_what_it_can(how: str, shape: tuple, dtype: str, served: bool):
    B, T, N, G, H = shape
    q, k = (jax.ShapeDtypeStruct((B, T, n, H), jnp.dtype(dtype)) for n in (N, G))
    with jax.set_mesh(make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])):
        assert (kernels.over_itself(how, q, k) is not None) == served


def test_what_no_kernel_serves_is_plain_to_the_bit():
    arrays = sequences(2, 100, 4, 2, 64)
    plain = over_itself(*arrays, implementation="plain")
    for how in ("pallas", "cudnn"):
        assert_same_tree(over_itself(*arrays, implementation=how), plain, rounding=0)


def test_a_platform_has_its_kernels_and_the_setting_can_refuse_them():
    platforms = ("tpu", "gpu", "cpu")
    assert [attention_on(where, "auto") for where in platforms] == ["pallas", "cudnn", "plain"]
    assert {attention_on(where, "plain") for where in platforms} == {"plain"}
    assert attention_on("tpu", "pallas") == "pallas"
    with pytest.raises(ValueError, match=r"`attention` = 'pallas' is for tpu.*runs on cpu"):
        attention_on("cpu", "pallas")
