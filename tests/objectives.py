"""SAGE-OPD and the objectives it is compared with, for tests of whatever computes them."""

from dataclasses import replace

from opd_jax.learner.objective import Objective

SAGE = Objective(
    divergence="reverse_kl",
    beta=0.5,
    intervention=True,
    confidence=True,
    confidence_temperature=1.0,
    weak_weight=0.5,
    skip_weight=0.0,
    fail_weight=1.0,
    entropy_bonus=0.0,
    entropy_threshold=0.8,
    normalize="all_tokens",
    scope="batch",
    eps=1e-8,
    max_z=0.0,
)
OPD = replace(SAGE, intervention=False, confidence=False, normalize="none")  # the token mean
SFT = replace(OPD, divergence="cross_entropy")
