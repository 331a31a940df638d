"""Mixture of experts: a feed-forward layer in which each token uses a few of many networks.

Axes besides those of `model.sizes`: `E` experts · `K` experts of a token · `M` tokens of a batch,
over all rows · `R` = M · K pairs of a token and an expert.

The pairs are sorted by expert, and one ragged product multiplies each expert's rows by its matrix.
There is no capacity limit: nothing is padded and no token is dropped, so a token's output does not
depend on other tokens.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.model.projections import Int8Weight, project_groups
from opd_jax.runtime.mesh import Rules, psum, shard_map, shards


@dataclass(frozen=True)
class Experts:
    """The experts of every layer of a model; static under `jit`.

    Attributes:
      count: experts, `E`.
      per_token: experts of a token, `K`.
      d_ff: feed-forward width of each expert, `F`.
      normalized: scale the K router probabilities to sum to one. If false they stay as in the
        softmax over all experts.
    """

    count: int
    per_token: int
    d_ff: int
    normalized: bool


def feed_forward(
    layer: dict, x_BTD: jax.Array, experts: Experts, *, all_gather: bool, rules: Rules
) -> jax.Array:
    """Σ p_e · FFN_e(x) over the K experts e with the highest router probability p_e.

    On a mesh each device sorts only the tokens of its own rows. The compiler alone would all-gather
    the tokens of all devices to sort them.

    Args:
      layer: `router` [D, E], `expert_gate` and `expert_up` [E, D, F], `expert_down` [E, F, D].
      x_BTD: normalized activations.
      all_gather: all-gather weights over `fsdp`; F stays sharded over `tensor`. If false, tokens
        are all-gathered over `fsdp` instead, and their D is sharded like the weights' D.
      rules: `mesh.TRAINING` or `mesh.DECODING`.

    Returns:
      [B, T, D] in the dtype of `x_BTD`. Router probabilities are float32.
    """
    batch, width = ("batch", None) if all_gather else ("decode_batch", "embed")
    axes: dict[str, tuple] = {
        "router": (width, None),
        "expert_gate": (None, width, "mlp"),
        "expert_up": (None, width, "mlp"),
        "expert_down": (None, "mlp", width),
    }
    tokens = (None if len(x_BTD) % shards(batch, rules=rules) else batch, None, width)
    mix = shard_map(
        partial(_mix, experts=experts, width=width, rules=rules),
        in_axes=({name: _axes(layer[name], axes[name]) for name in axes}, tokens),
        out_axes=tokens,
        summed="mlp",
        rules=rules,
    )
    return mix({name: layer[name] for name in axes}, x_BTD)


def _axes(weight: Any, axes: tuple) -> Any:
    """Logical axes of a weight. An int8 scale has the axes of expert and output channel."""
    return Int8Weight(axes, (axes[0], axes[2])) if isinstance(weight, Int8Weight) else axes


def _mix(
    layer: dict, x_BTD: jax.Array, experts: Experts, width: str | None, rules: Rules
) -> jax.Array:
    """`feed_forward` on one device: its shard of F gives a partial sum over F.

    If D is sharded too, `width` is its logical axis, and products over D are psummed.
    """

    def product(x_RD: jax.Array, weight: Any) -> jax.Array:
        if not width:
            return project_groups(x_RD, weight, expert_R, sizes_E, dtype=x_RD.dtype)
        part = project_groups(x_RD, weight, expert_R, sizes_E, dtype=jnp.float32)
        return psum(part, width, rules=rules).astype(x_RD.dtype)

    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    logits_ME = jnp.matmul(x_MD, layer["router"], preferred_element_type=jnp.float32)
    if width:
        logits_ME = psum(logits_ME, width, rules=rules)
    weight_MK, expert_MK = route(logits_ME, experts)
    order_R = jnp.argsort(expert_MK.ravel())  # stable: by expert, then by token
    expert_R = expert_MK.ravel()[order_R]
    sizes_E = jnp.bincount(expert_R, length=experts.count)
    x_RD = x_MD[order_R // experts.per_token]
    gate, up = product(x_RD, layer["expert_gate"]), product(x_RD, layer["expert_up"])
    h_RF, down = jax.nn.silu(gate) * up, layer["expert_down"]
    out_RD = project_groups(h_RF, down, expert_R, sizes_E, dtype=h_RF.dtype)
    # Gather the results back into token order. A scatter-add would sum the K terms in any order.
    out_MKD = out_RD[jnp.argsort(order_R)].reshape(*expert_MK.shape, -1)
    mixed = jnp.einsum("mkd,mk->md", out_MKD, weight_MK, preferred_element_type=jnp.float32)
    return mixed.astype(x_BTD.dtype).reshape(x_BTD.shape)


def route(logits_ME: jax.Array, experts: Experts) -> tuple[jax.Array, jax.Array]:
    """(weights float32 [M, K], experts int32 [M, K]) of each token, most probable expert first."""
    weight_MK, expert_MK = jax.lax.top_k(jax.nn.softmax(logits_ME), experts.per_token)
    if experts.normalized:
        weight_MK /= jnp.sum(weight_MK, axis=-1, keepdims=True)
    return weight_MK, expert_MK
