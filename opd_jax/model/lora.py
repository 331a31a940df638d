"""Low-rank adapters: a student of which only small factors beside its projections are trained.

A projection's weight W [in, out] stays as it is, and y = x W + (α / r) · (x A) B with A [in, r] and
B [r, out]. B starts at zero, so the first student is the model it adapts. Gradients, optimizer
moments and checkpoints are those of A and B alone; W is read, in the dtype that is computed in or
in int8, and is never written.

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

# Not those of experts: a token takes a few, so each adapter would see a small part of a batch.
TARGETS = tuple(key for key in CONTRACTED if not key.startswith("expert_"))


@dataclass(frozen=True)
class Lora:
    """Which projections have adapters, and of what size; static under `jit`.

    Attributes:
      rank: r, columns of A and rows of B; 0 trains all parameters instead.
      alpha: α; what is added is scaled by α / r.
      targets: of `TARGETS`, each once.
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
    """The tree of `ParamSpec` of the adapters: `{target: {"a": ..., "b": ...}}`, over all layers.

    A is normal with variance 1 / in, so that x A is as large as x; B is zero.

    Raises:
      ValueError: a target that this model does not have or that cannot be adapted, or a rank that
        is no lower than that of a weight.
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
    """The parameters that a student computes with: nothing is computed, only one tree made of two.

    Args:
      base: what is adapted; None without `lora`.
      trained: adapters in the tree of `lora_specs`, or, without `lora`, all parameters.
      lora: the scale of the adapters is of it.

    Returns:
      `base` with a `LoraWeight` in the place of each weight that has an adapter, or `trained`.

    Raises:
      ValueError: one of `base` and `lora` is given without the other.
    """
    if lora is None and base is None:
        return trained
    if lora is None or base is None:
        raise ValueError(
            "`base` is what `lora` adapts: give both, or neither where all parameters are trained; "
            f"got `base` {'None' if base is None else 'given'}, `lora` {lora}"
        )
    scale = lora.alpha / lora.rank
    adapted = {
        key: LoraWeight(base["layers"][key], adapter["a"], adapter["b"], scale)
        for key, adapter in trained.items()
    }
    return base | {"layers": base["layers"] | adapted}


def specs_like(params: Params, config: ModelConfig) -> Params:
    """`model.param_specs` in the tree of `params`, some of which may be quantized or adapted."""
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
    """W + (α / r) · A B in float32: the one array that stands for an adapted weight.

    An `Int8Weight`, adapted or not, becomes the float weight that it stands for.

    Args:
      weight: of a projection, stacked over layers or not.
      contracted: its axes that the projection sums over; those before them are of the stack.
    """
    if isinstance(weight, Int8Weight):
        return dequantize_weight(weight, contracted=contracted)
    if not isinstance(weight, LoraWeight):
        return weight.astype(jnp.float32)
    base, stack = merged(weight.base, contracted=contracted), weight.a.shape[: contracted[0]]
    rank = weight.a.shape[-1]
    a = weight.a.astype(jnp.float32).reshape(*stack, -1, rank)
    b = weight.b.astype(jnp.float32).reshape(*stack, rank, -1)
    # Else an accelerator would multiply in less than float32.
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return base + weight.scale * product.reshape(base.shape)
