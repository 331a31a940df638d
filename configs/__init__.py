"""Experiments, one file each; installed as `opd_jax.configs`."""
