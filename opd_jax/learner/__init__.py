"""One update: a batch, the objective, the optimizer, the compiled step."""
