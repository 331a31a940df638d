"""Text environments behind one protocol. Nothing here imports JAX."""
