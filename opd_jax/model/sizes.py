"""Sizes and switches of one model.

Axes, declared once for the package:
  `B` trajectories · `T` tokens · `K` turns · `R` student tokens of a row · `V` vocabulary
  `D` width · `N` query heads · `G` key/value heads · `H` head size · `F` feed-forward width
  `S` cache slots · `L` layers
"""

from dataclasses import dataclass

from opd_jax.model import moe
from opd_jax.runtime.fields import check_within


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 scaling of rotary frequencies: long wavelengths are stretched.

    Attributes:
      factor: divides the low frequencies.
      low_freq_factor: low frequencies have a wavelength above `original_max_positions` / this.
      high_freq_factor: high frequencies have a wavelength below `original_max_positions` / this.
        They are kept.
      original_max_positions: the longest sequence before the context was extended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one model; static under `jit`.

    Attributes:
      vocab_size: V, rows of the embedding.
      d_model: D, width of the residual stream.
      num_layers: L.
      num_heads: N, query heads.
      num_kv_heads: G, key/value heads; divides N.
      head_dim: H, size of a head, even.
      d_ff: F, width of the feed-forward layer.
      norm_eps: added to the mean square in every RMS norm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: scaling of the rotary frequencies, or None.
      max_positions: the longest sequence the model was trained for.
      qk_norm: RMS norm on each query and key head before the rotation (Qwen3).
      qkv_bias: bias on the query, key and value projections (Qwen2.5).
      tied: the output head is the transposed embedding.
      experts: a mixture of experts replaces the dense feed-forward layer; None for a dense model.
      unused_ids: rows of the embedding that no token has, ranges [start, stop); never sampled.
      attention: what computes it, a key of `kernels.ATTENTION`.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_positions: int
    qk_norm: bool
    qkv_bias: bool
    tied: bool
    experts: moe.Experts | None = None
    unused_ids: tuple[tuple[int, int], ...] = ()
    attention: str = "plain"

    def __post_init__(self):
        sizes = ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        check_within(1, **{name: getattr(self, name) for name in (*sizes, "d_ff", "max_positions")})
        check_within(1e-30, norm_eps=self.norm_eps, rope_theta=self.rope_theta)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"`num_kv_heads`: expected a divisor of `num_heads` = {self.num_heads}, got "
                f"{self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"`head_dim`: expected an even number, got {self.head_dim}")
