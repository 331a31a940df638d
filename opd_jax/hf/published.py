"""Sizes of well-known models, for plans on machines without their folders.

Source: `config.json` of Qwen/Qwen3-0.6B and its larger siblings on the Hugging Face hub.
"""

from opd_jax.model import ModelConfig
from opd_jax.model.moe import Experts


def _qwen3(
    layers: int,
    width: int,
    heads: int,
    d_ff: int,
    *,
    tied: bool,
    kv_heads: int = 8,
    experts: Experts | None = None,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=151_936,
        d_model=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        d_ff=d_ff,
        norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        max_positions=40_960,
        qk_norm=True,
        qkv_bias=False,
        tied=tied,
        experts=experts,
    )


# By the name of the repository, usually also that of the downloaded folder.
PUBLISHED = {
    "Qwen3-0.6B": _qwen3(28, 1024, 16, 3072, tied=True),
    "Qwen3-1.7B": _qwen3(28, 2048, 16, 6144, tied=True),
    "Qwen3-4B": _qwen3(36, 2560, 32, 9728, tied=True),
    "Qwen3-8B": _qwen3(36, 4096, 32, 12_288, tied=False),
    "Qwen3-14B": _qwen3(40, 5120, 40, 17_408, tied=False),
    "Qwen3-32B": _qwen3(64, 5120, 64, 25_600, tied=False),
    "Qwen3-30B-A3B": _qwen3(
        48,
        2048,
        32,
        6144,
        tied=False,
        kv_heads=4,
        experts=Experts(count=128, per_token=8, d_ff=768, normalized=True),
    ),
}
