"""The sizes of a model that compiles fast. Tests take them as they are or change some."""

from opd_jax.model import ModelConfig

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
