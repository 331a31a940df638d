"""Selective multi-turn on-policy distillation of language-model agents in JAX.

The names below are the library. Each is imported when it is first used (PEP 562), so that
`import opd_jax.losses` loads JAX and nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd_jax.agent.rollout import rollout
    from opd_jax.envs.base import Env, Observation, Task
    from opd_jax.learner.train_step import make_train_step
    from opd_jax.losses import (
        NO_TURN,
        Verdict,
        forward_kl,
        fused_divergence,
        intervention_weight,
        jsd,
        reverse_kl,
        sage_weights,
        sampled_reverse_kl,
        turn_confidence,
        weighted_loss,
    )
    from opd_jax.model import ModelConfig

__version__ = "0.1.0"

__all__ = [
    "NO_TURN",
    "Env",
    "ModelConfig",
    "Observation",
    "Task",
    "Verdict",
    "forward_kl",
    "fused_divergence",
    "intervention_weight",
    "jsd",
    "make_train_step",
    "reverse_kl",
    "rollout",
    "sage_weights",
    "sampled_reverse_kl",
    "turn_confidence",
    "weighted_loss",
]

_ELSEWHERE = {
    "Env": "envs.base",
    "ModelConfig": "model",
    "Observation": "envs.base",
    "Task": "envs.base",
    "make_train_step": "learner.train_step",
    "rollout": "agent.rollout",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module `opd_jax` has no attribute {name!r}")
    return getattr(import_module(f"opd_jax.{_ELSEWHERE.get(name, 'losses')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
