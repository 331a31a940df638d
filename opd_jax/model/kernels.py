"""Attention by kernels that come with JAX, for the shapes that they can serve.

On a TPU: splash attention for a sequence over itself. On a GPU: cuDNN's. `attention` has the plain
form, which they compute too, and falls back to it. A kernel runs on one device, so each device
runs it on its own rows and heads.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.runtime.mesh import TRAINING, shard_map, shards

# What computes attention -> the platform that it is for, as JAX names it; None: any.
ATTENTION = {"plain": None, "pallas": "tpu", "cudnn": "gpu"}

# Sizes of a kernel's blocks of a sequence. The larger, the fewer steps.
_BLOCKS = (512, 384, 256, 128)

# Those of splash attention: forwards, and for the gradients of keys and values and of queries.
_SPLASH_SIZES = (
    *("block_q", "block_kv", "block_kv_compute"),
    *("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
    *("block_q_dq", "block_kv_dq"),
)

_QUERIES = ("batch", None, "heads", None)
_KEYS = ("batch", None, "kv_heads", None)

Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def attention_on(platform: str, setting: str) -> str:
    """What computes attention on a platform (JAX's name): a key of `ATTENTION`.

    Args:
      setting: a key of `ATTENTION`, or "auto" for the platform's kernels.

    Raises:
      ValueError: the setting is for another platform.
    """
    if setting == "auto":
        return next((name for name, where in ATTENTION.items() if where == platform), "plain")
    if ATTENTION[setting] not in (None, platform):
        raise ValueError(
            f"`attention` = {setting!r} is for {ATTENTION[setting]}, and this runs on {platform}; "
            "set it to auto or plain"
        )
    return setting


def over_itself(implementation: str, q_BTNH: jax.Array, k_BTGH: jax.Array) -> Kernel | None:
    """The kernel for these queries and keys of whole sequences; None if none can serve them.

    Any kernel needs rows and key/value heads that divide over the mesh. Splash attention needs
    whole blocks of a sequence, and head sizes that are multiples of 64. cuDNN needs 16-bit floats,
    and head sizes that are multiples of 8, up to 128.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[-1]
    if len(k_BTGH) % shards("batch") or k_BTGH.shape[2] % shards("kv_heads"):
        return None
    if implementation == "pallas" and _block(T) and H % 64 == 0:
        return _on_each_device(_splash)
    if implementation == "cudnn" and q_BTNH.dtype.itemsize == 2 and H % 8 == 0 and H <= 128:
        return _on_each_device(_cudnn)
    return None


def _block(size: int) -> int | None:
    """The largest block that divides a sequence or a row of a cache; None if none does."""
    return next((block for block in _BLOCKS if size % block == 0), None)


def _on_each_device(kernel: Kernel) -> Kernel:
    axes = _QUERIES, _KEYS, _KEYS
    return shard_map(kernel, in_axes=axes, out_axes=_QUERIES, summed=None, rules=TRAINING)


def _splash(q_BTNH: jax.Array, k_BTGH: jax.Array, v_BTGH: jax.Array) -> jax.Array:
    """Scores, softmax and sums are float32. The scaled queries are rounded to their dtype.

    Source: Dao et al., arXiv 2205.14135; blocks above the diagonal are skipped.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    B, T, N, H = q_BTNH.shape
    block: Any = _block(T)

    def heads(x: jax.Array) -> jax.Array:
        """Those of all rows, one after another: a group of queries still follows its keys."""
        return jnp.swapaxes(x, 1, 2).reshape(-1, T, H)

    attend = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((T, T))] * (B * N)),
        block_sizes=splash.BlockSizes(**dict.fromkeys(_SPLASH_SIZES, block)),
        head_shards=1,
        q_seq_shards=1,
    )
    mixed = attend(heads(q_BTNH * H**-0.5), heads(k_BTGH), heads(v_BTGH))
    return jnp.swapaxes(mixed.reshape(B, N, T, H), 1, 2)


def _cudnn(q_BTNH: jax.Array, k_BTGH: jax.Array, v_BTGH: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTGH, v_BTGH, is_causal=True, implementation="cudnn"
    )
