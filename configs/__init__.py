"""The configs that ship. Others build on them: `from opd_jax.configs import quickstart`."""
