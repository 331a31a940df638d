"""Mixture of experts: a feed-forward layer in which each token takes a few of many networks.

Axes, beside those of `model`: `E` experts · `K` experts a token takes · `M` tokens, rows of a batch
merged · `R` = M · K, pairs of a token and an expert.

The pairs are sorted by expert, so that the rows of an expert stand together and one ragged product
multiplies each group by its own matrix. Nothing is padded to a capacity and no token is dropped: a
token's output does not depend on the others.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.model.projections import Int8Weight, project_groups
from opd_jax.runtime.mesh import divides, on_each_device, total


@dataclass(frozen=True)
class Experts:
    """The experts of every layer of a model; static under `jit`.

    Attributes:
      count: experts, `E`.
      per_token: experts that a token takes, `K`.
      d_ff: feed-forward width of each.
      normalized: the weights of the experts that are taken are scaled to sum to one; else they are
        their share of the softmax over all.
    """

    count: int
    per_token: int
    d_ff: int
    normalized: bool


def feed_forward(
    layer: dict, x_BTD: jax.Array, experts: Experts, *, keep_sharded: bool
) -> jax.Array:
    """Σ over the K experts e with the highest router probability of p_e · FFN_e(x).

    On a mesh each device sorts the tokens of its own rows: the compiler, left alone, would gather
    those of all devices to sort them. Expert weights are gathered over the devices that share the
    batch, and stay split by their width.

    Args:
      layer: `router` [D, E], `expert_gate` and `expert_up` [E, D, F], `expert_down` [E, F, D].
      x_BTD: normalized activations.
      keep_sharded: weights are gathered over no devices; each has all tokens, and a part of D too.

    Returns:
      [B, T, D] in the dtype of `x_BTD`. Router probabilities are float32.
    """
    batch, width = ("decode_batch", "embed") if keep_sharded else ("batch", None)
    axes: dict[str, tuple] = {
        "router": (width, None),
        "expert_gate": (None, width, "mlp"),
        "expert_up": (None, width, "mlp"),
        "expert_down": (None, "mlp", width),
    }
    tokens = (batch if divides(len(x_BTD), batch) else None, None, width)
    mix = on_each_device(
        partial(_mix, experts=experts, width=width),
        in_axes=({name: _axes(layer[name], axes[name]) for name in axes}, tokens),
        out_axes=tokens,
        summed="mlp",
    )
    return mix({name: layer[name] for name in axes}, x_BTD)


def _axes(weight: Any, axes: tuple) -> Any:
    """The axes of a weight's parts: a scale has those of its expert and its output channels."""
    return Int8Weight(axes, (axes[0], axes[2])) if isinstance(weight, Int8Weight) else axes


def _mix(layer: dict, x_BTD: jax.Array, experts: Experts, width: str | None) -> jax.Array:
    """`feed_forward` of tokens that are all here; with a part of F, a part of the sum.

    Args:
      width: the logical axis of D, where there is only a part of that as well.
    """

    def product(x_RD: jax.Array, weight: Any) -> jax.Array:
        if not width:
            return project_groups(x_RD, weight, expert_R, sizes_E, dtype=x_RD.dtype)
        part = project_groups(x_RD, weight, expert_R, sizes_E, dtype=jnp.float32)
        return total(part, width).astype(x_RD.dtype)

    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    logits_ME = jnp.matmul(x_MD, layer["router"], preferred_element_type=jnp.float32)
    weight_MK, expert_MK = route(total(logits_ME, width) if width else logits_ME, experts)
    order_R = jnp.argsort(expert_MK.ravel())  # stable: by expert, then by token
    expert_R = expert_MK.ravel()[order_R]
    sizes_E = jnp.bincount(expert_R, length=experts.count)
    x_RD = x_MD[order_R // experts.per_token]
    gate, up = product(x_RD, layer["expert_gate"]), product(x_RD, layer["expert_up"])
    h_RF, down = jax.nn.silu(gate) * up, layer["expert_down"]
    out_RD = project_groups(h_RF, down, expert_R, sizes_E, dtype=h_RF.dtype)
    # Back into the order of tokens by reading rather than by adding: K terms in a fixed order.
    out_MKD = out_RD[jnp.argsort(order_R)].reshape(*expert_MK.shape, -1)
    mixed = jnp.einsum("mkd,mk->md", out_MKD, weight_MK, preferred_element_type=jnp.float32)
    return mixed.astype(x_BTD.dtype).reshape(x_BTD.shape)


def route(logits_ME: jax.Array, experts: Experts) -> tuple[jax.Array, jax.Array]:
    """(weights float32 [M, K], experts int32 [M, K]) of each token, the most probable first."""
    weight_MK, expert_MK = jax.lax.top_k(jax.nn.softmax(logits_ME), experts.per_token)
    if experts.normalized:
        weight_MK /= jnp.sum(weight_MK, axis=-1, keepdims=True)
    return weight_MK, expert_MK
