"""Models that compile fast: sizes that tests take as they are or change, and a forced model."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.model import ModelConfig, Params, is_spec, param_specs

TINY = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=24,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    max_positions=64,
    qk_norm=True,
    qkv_bias=False,
    tied=False,
)


def one_layer(vocab: int, *, width: int = 16, head_dim: int = 8) -> ModelConfig:
    """For conversations of up to 256 tokens."""
    return replace(
        TINY,
        vocab_size=vocab,
        d_model=width,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=head_dim,
        d_ff=16,
        rope_theta=1e3,
        max_positions=256,
    )


def chain(vocab: int, successor: Mapping[int, int], *, logit: float) -> tuple[ModelConfig, Params]:
    """A model whose next token depends on the last one alone: its successor has `logit`, others 0.

    One-hot embeddings, silent layers, and a head that maps each token to its successor.
    """
    config = one_layer(vocab, width=vocab, head_dim=2)
    params = jax.tree.map(lambda spec: jnp.zeros(spec.shape), param_specs(config), is_leaf=is_spec)
    head = np.zeros((vocab, vocab), np.float32)
    for token, following in successor.items():
        head[token, following] = logit / np.sqrt(vocab)  # a normalized one-hot has the entry √V
    ends = {"embed": jnp.eye(vocab), "final_norm": jnp.ones(vocab), "head": jnp.asarray(head)}
    return config, params | ends


def assert_same_tree(got: Params, want: Params, *, rounding: float) -> None:
    """Equal up to `rounding` times the largest entry of each array; 0: equal to the bit."""
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        atol = rounding * np.max(np.abs(y))
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))
