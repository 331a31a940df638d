"""Selective multi-turn on-policy distillation of language-model agents in JAX.

The names below are the library. Each is imported when it is first used (PEP 562), so that
`import opd_jax.losses` loads JAX and nothing else.
"""

import sys
from importlib import import_module
from typing import Any

if sys.argv[:1] == ["-m"]:  # a command begins, and what it imports takes seconds
    from opd_jax.runtime.exits import end_at_ctrl_c

    end_at_ctrl_c()

__version__ = "0.1.0"

_NAMES = {
    "agent.rollout": ["rollout"],
    "envs.base": ["Env", "Observation", "Task"],
    "learner.train_step": ["make_train_step"],
    "losses": [
        "NO_TURN",
        "Verdict",
        "forward_kl",
        "fused_divergence",
        "intervention_weight",
        "jsd",
        "reverse_kl",
        "sage_weights",
        "sampled_reverse_kl",
        "turn_confidence",
        "weighted_loss",
    ],
    "model": ["Model", "ModelConfig"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module `opd_jax` has no attribute {name!r}")
    return getattr(import_module(f"opd_jax.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
