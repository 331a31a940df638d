"""Mixture of experts: a feed-forward layer in which each token takes a few of many networks.

Axes, beside those of `model`: `E` experts · `K` experts a token takes · `M` tokens, rows of a batch
merged · `R` = M · K, pairs of a token and an expert.

The pairs are sorted by expert, so that the rows of an expert stand together and one ragged product
multiplies each group by its own matrix. Nothing is padded to a capacity and no token is dropped: a
token's output does not depend on the others.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from opd_jax.linear import project_groups


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


def feed_forward(layer: dict, x_BTD: jax.Array, experts: Experts) -> jax.Array:
    """Σ over the K experts e with the highest router probability of p_e · FFN_e(x).

    Args:
      layer: `router` [D, E], `expert_gate` and `expert_up` [E, D, F], `expert_down` [E, F, D].
      x_BTD: normalized activations.

    Returns:
      [B, T, D] in the dtype of `x_BTD`. Router probabilities and the sum are float32.
    """
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    weight_MK, expert_MK = route(layer["router"], x_MD, experts)
    order_R = jnp.argsort(expert_MK.ravel())  # stable: by expert, then by token
    expert_R = expert_MK.ravel()[order_R]
    sizes_E = jnp.bincount(expert_R, length=experts.count)
    x_RD = x_MD[order_R // experts.per_token]
    gate, up = (
        project_groups(x_RD, layer[name], expert_R, sizes_E)
        for name in ("expert_gate", "expert_up")
    )
    out_RD = project_groups(jax.nn.silu(gate) * up, layer["expert_down"], expert_R, sizes_E)
    # Back into the order of tokens by reading rather than by adding: K terms in a fixed order.
    out_MKD = out_RD[jnp.argsort(order_R)].reshape(*expert_MK.shape, -1)
    mixed = jnp.einsum("mkd,mk->md", out_MKD, weight_MK, preferred_element_type=jnp.float32)
    return mixed.astype(x_BTD.dtype).reshape(x_BTD.shape)


def route(router_DE: jax.Array, x_MD: jax.Array, experts: Experts) -> tuple[jax.Array, jax.Array]:
    """(weights float32 [M, K], experts int32 [M, K]) of each token, the most probable first."""
    logits = jnp.einsum("md,de->me", x_MD, router_DE, preferred_element_type=jnp.float32)
    weight_MK, expert_MK = jax.lax.top_k(jax.nn.softmax(logits), experts.per_token)
    if experts.normalized:
        weight_MK /= jnp.sum(weight_MK, axis=-1, keepdims=True)
    return weight_MK, expert_MK
