"""Attention by kernels, for the shapes that they can serve.

On a TPU: JAX's splash attention for a sequence over itself, and our own (`ragged`) for one new
token a row over a cache. On a GPU: cuDNN's, for a sequence over itself. `attention` has the plain
forms, which they compute too, and falls back to them. A kernel runs on one device, so each device
runs it on its own rows and heads.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.model.cache import Buffer, Int8Slots
from opd_jax.model.ragged import block_of, ragged_attention
from opd_jax.runtime.fields import check_choice
from opd_jax.runtime.mesh import DECODING, TRAINING, Rules, shard_map, shards

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

Kernel = Callable[..., jax.Array]


def attention_on(platform: str, setting: str) -> str:
    """What computes attention on a platform (JAX's name): a key of `ATTENTION`.

    Args:
      setting: a key of `ATTENTION`, or "auto": kernels on a TPU, else plain. cuDNN's gradients
        need not have the same bits in every run, so a run has to ask for it.

    Raises:
      ValueError: the setting is for another platform.
    """
    if setting == "auto":
        return "pallas" if platform == "tpu" else "plain"
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
    an even length, and head sizes that are multiples of 8, up to 128.
    """
    check_choice(ATTENTION, attention=implementation)
    B, T, G, H = k_BTGH.shape
    if not _divide(B, G, TRAINING):
        return None
    if implementation == "pallas" and _block(T) and H % 64 == 0:
        return _on_each_device(_splash)
    half = q_BTNH.dtype.itemsize == 2
    if implementation == "cudnn" and half and T % 2 == 0 and H % 8 == 0 and H <= 128:
        return _on_each_device(_cudnn)
    return None


def over_a_cache(
    implementation: str, q_BTNH: jax.Array, k_CGSH: Buffer, rows: jax.Array | None
) -> Kernel | None:
    """The kernel for these queries of new tokens and these keys of a cache; None if none can serve.

    Its arguments are queries [B, N, H], keys and values [B, G, S, H], and lengths [B]: how many
    slots each row reads, at least one. The kernel needs one new token for each row of the cache,
    rows and key/value heads that divide over the mesh, whole blocks of slots, and head sizes that
    are multiples of 128: of others the compiler would copy the cache.
    """
    if implementation != "pallas" or rows is not None or q_BTNH.shape[1] > 1:
        return None
    values = k_CGSH.values if isinstance(k_CGSH, Int8Slots) else k_CGSH
    C, G, S, H = values.shape
    if not _divide(C, G, DECODING) or H % 128:
        return None
    of_a_device = G // shards("kv_heads", rules=DECODING)
    if not block_of(S, slot_bytes=of_a_device * H * values.dtype.itemsize):
        return None
    slots = ("batch", "kv_heads", "slots", "head_dim")
    cache: Any = Int8Slots(slots, slots[:-1]) if isinstance(k_CGSH, Int8Slots) else slots
    queries = ("batch", "heads", "head_dim")
    axes = queries, cache, cache, ("batch",)
    return shard_map(ragged_attention, in_axes=axes, out_axes=queries, summed=None, rules=DECODING)


def _divide(rows: int, kv_heads: int, rules: Rules) -> bool:
    ways = shards("batch", rules=rules), shards("kv_heads", rules=rules)
    return rows % ways[0] == 0 and kv_heads % ways[1] == 0


def _block(size: int) -> int | None:
    """The largest block that divides a sequence; None if none does."""
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
