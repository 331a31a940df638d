"""Low-rank adapters (LoRA): train only two small factors beside each projection.

The weight W [in, out] of a projection is frozen: y = x W + (α / r) · (x A) B, with A [in, r] and
B [r, out]. B starts at zero, so the student starts as the model it adapts. Gradients, optimizer
moments and checkpoints hold only A and B. W may be in the compute dtype or in int8.

Source: Hu et al., LoRA (arXiv 2106.09685).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.model import ModelConfig, Params, ParamSpec, param_specs
from opd_jax.model.int8 import contracted_axes, dequantize_weight, int8_spec
from opd_jax.model.projections import CONTRACTED, Int8Weight, LoraWeight
from opd_jax.runtime.fields import check_choice, check_within

# Experts have no adapters: each would see only the few tokens of a batch that are routed to it.
TARGETS = tuple(key for key in CONTRACTED if not key.startswith("expert_"))


@dataclass(frozen=True)
class Lora:
    """Which projections have adapters, and their size; static under `jit`.

    Attributes:
      rank: r, columns of A and rows of B; 0 trains all parameters instead.
      alpha: α; the product A B is scaled by α / r.
      targets: names of projections, from `TARGETS`, each once.
      int8: the frozen projections are rounded to 8 bits.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    int8: bool

    def __post_init__(self):
        check_within(0, rank=self.rank)
        check_within(1e-9, alpha=self.alpha)
        for target in self.targets:
            check_choice(TARGETS, targets=target)
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"`targets`: expected one or more projections, each once, got {[*self.targets]}"
            )
        if self.int8 and not self.rank:
            raise ValueError(
                "`int8` rounds weights that are not trained, but `rank` = 0 trains them all: give "
                "a rank, or set `int8` to False"
            )


def lora_specs(config: ModelConfig, lora: Lora) -> Params:
    """The `ParamSpec` tree of the adapters, `{target: {"a": ..., "b": ...}}`, stacked over layers.

    A is normal with variance 1 / in, so that x A is as large as x. B is zero.

    Raises:
      ValueError: the model does not have a target, a target cannot be adapted, or `rank` is not
        below the rank of a weight.
    """
    layers = param_specs(config)["layers"]
    known = [key for key in TARGETS if key in layers]
    for key in lora.targets:
        if key not in known:
            raise ValueError(
                f"`lora.targets`: this model has adapters for {', '.join(known)}, got {key!r}"
                f"{'; its experts cannot be adapted' if config.experts else ''}"
            )
    return {key: _adapter_specs(key, layers[key], lora.rank) for key in lora.targets}


def _adapter_specs(key: str, spec: ParamSpec, rank: int) -> dict[str, ParamSpec]:
    contracted = contracted_axes(key, spec)
    stack, end = contracted[0], contracted[-1] + 1
    inputs, outputs = math.prod(spec.shape[stack:end]), math.prod(spec.shape[end:])
    if not 1 <= rank < min(inputs, outputs):
        raise ValueError(
            f"`lora.rank`: expected 1 or more and less than {min(inputs, outputs)}, the rank of "
            f"`{key}` [{inputs}, {outputs}], got {rank}"
        )
    a = ParamSpec((*spec.shape[:end], rank), (*spec.axes[:end], "lora_rank"), 1 / math.sqrt(inputs))
    b = ParamSpec(
        (*spec.shape[:stack], rank, *spec.shape[end:]),
        (*spec.axes[:stack], "lora_rank", *spec.axes[end:]),
        0.0,
    )
    return {"a": a, "b": b}


def with_adapters(base: Params | None, trained: Params, lora: Lora | None) -> Params:
    """The parameters that a student runs with: joins two trees and computes nothing.

    Args:
      base: the frozen parameters; None without `lora`.
      trained: adapters in the tree of `lora_specs`; without `lora`, all parameters.
      lora: gives the scale α / r; None if all parameters are trained.

    Returns:
      `base` with a `LoraWeight` for each weight that has an adapter; without `lora`, `trained`.

    Raises:
      ValueError: one of `base` and `lora` is given without the other.
    """
    if lora is None and base is None:
        return trained
    if lora is None or base is None:
        raise ValueError(
            "`base` is what `lora` adapts: give both, or neither if all parameters are trained; "
            f"got `base` {'None' if base is None else 'given'}, `lora` {lora}"
        )
    scale = lora.alpha / lora.rank
    adapted = {
        key: LoraWeight(base["layers"][key], adapter["a"], adapter["b"], scale)
        for key, adapter in trained.items()
    }
    return base | {"layers": base["layers"] | adapted}


def plain_params(params: Params, config: ModelConfig) -> Params:
    """`params` with each adapted or quantized weight as one float32 array (`merged`)."""
    specs = param_specs(config)["layers"]
    layers = {
        key: merged(weight, contracted=contracted_axes(key, specs[key]))
        if isinstance(weight, (Int8Weight, LoraWeight))
        else weight
        for key, weight in params["layers"].items()
    }
    return params | {"layers": layers}


def specs_like(params: Params, config: ModelConfig) -> Params:
    """`model.param_specs` in the tree of `params`, whose weights may be quantized or adapted."""
    specs = param_specs(config)
    layers = {
        key: _spec_like(weight, key, specs["layers"][key])
        for key, weight in params["layers"].items()
    }
    return specs | {"layers": layers}


def _spec_like(weight: Any, key: str, spec: ParamSpec) -> Any:
    if isinstance(weight, Int8Weight):
        return int8_spec(key, spec)
    if not isinstance(weight, LoraWeight):
        return spec
    adapter = _adapter_specs(key, spec, weight.a.shape[-1])
    base = _spec_like(weight.base, key, spec)
    return LoraWeight(base, adapter["a"], adapter["b"], weight.scale)


@partial(jax.jit, static_argnames="contracted")
def merged(weight: jax.Array | Int8Weight | LoraWeight, *, contracted: tuple[int, ...]):
    """An adapted or quantized weight as one float32 array: W + (α / r) · A B.

    The weight may be stacked. The axes before the `contracted` ones are the stack.
    """
    if isinstance(weight, Int8Weight):
        return dequantize_weight(weight, contracted=contracted)
    if not isinstance(weight, LoraWeight):
        return weight.astype(jnp.float32)
    base, stack = merged(weight.base, contracted=contracted), weight.a.shape[: contracted[0]]
    rank = weight.a.shape[-1]
    a = weight.a.astype(jnp.float32).reshape(*stack, -1, rank)
    b = weight.b.astype(jnp.float32).reshape(*stack, rank, -1)
    # By default an accelerator multiplies float32 in a lower precision.
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return base + weight.scale * product.reshape(base.shape)
