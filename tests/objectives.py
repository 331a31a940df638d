"""SAGE-OPD and the objectives it is compared with, for tests of whatever computes them."""

from dataclasses import replace
from typing import Any

from opd_jax.learner.objective import Objective
from opd_jax.learner.weighing import Weight

SAGE = Objective(
    divergence="reverse_kl",
    beta=0.5,
    teacher_turns="",
    weight=Weight(
        by="sage",
        skip_weight=0.0,
        weak_weight=0.5,
        fail_weight=1.0,
        confidence_temperature=1.0,
        entropy_bonus=1.0,
        entropy_threshold=0.8,
        most_weight=1.2,
        discrepancy_eps=1e-6,
        early_bonus=0.5,
        discount=0.5,
        teacher_samples=1,
        teacher_labels="oracle",
    ),
    normalize="all_tokens",
    scope="batch",
    eps=1e-8,
    max_z=0.0,
)


def weighed(objective: Objective, **settings: Any) -> Objective:
    """The objective with other settings of its weight."""
    return replace(objective, weight=replace(objective.weight, **settings))


OPD = replace(weighed(SAGE, by="uniform"), normalize="none")  # the token mean
SFT = replace(OPD, divergence="cross_entropy")
