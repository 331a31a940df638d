"""Selective multi-turn on-policy distillation of language-model agents (SAGE-OPD) in JAX."""
