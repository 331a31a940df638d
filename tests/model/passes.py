"""Forward passes of the model for tests: each config is compiled once."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import model
from opd_jax.model import ModelConfig, Params
from opd_jax.model.int8 import contracted_axes
from opd_jax.model.projections import Int8Weight


@cache
def _forward(config: ModelConfig) -> Callable:
    @jax.jit
    def run(params: Params, tokens: jax.Array) -> jax.Array:
        hidden = model.forward(params, tokens, config=config, query_chunk=8, remat="none")
        return jnp.matmul(hidden, model.head(params), preferred_element_type=jnp.float32)

    return run


def logits(params: Params, tokens: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Float32 logits of whole sequences."""
    return np.asarray(_forward(config)(params, tokens))


def cached_logits(
    params: Params,
    tokens: np.ndarray,
    config: ModelConfig,
    *,
    pieces: Sequence[Sequence[int]],
) -> np.ndarray:
    """The same over a cache. Each piece holds the number of tokens that each row appends.

    Positions that no piece reaches are zero.
    """
    rows, width = len(tokens), max(map(max, pieces))
    append = jax.jit(partial(model.forward_cached, config=config, sharded=False))
    dtype = params["embed"].dtype
    kv = model.init_cache(config, batch=rows, slots=24, dtype=dtype)
    out = np.zeros((*tokens.shape, config.vocab_size), np.float32)
    done = np.zeros(rows, int)
    for counts in pieces:
        piece = np.full((rows, width), config.vocab_size - 1)  # what fills a piece is dropped
        for row, count in enumerate(counts):
            piece[row, :count] = tokens[row, done[row] : done[row] + count]
        hidden, kv = append(params, kv, piece, jnp.array(counts))
        new = np.asarray(model.logits(params, hidden, sharded=False))
        for row, count in enumerate(counts):
            out[row, done[row] : done[row] + count] = new[row, :count]
        done += counts
    assert done.tolist() == kv.lengths.tolist()
    return out


def dequantized(weight: Int8Weight, contracted: tuple[int, ...]) -> np.ndarray:
    """`values · scale` in float64."""
    scale = np.expand_dims(np.asarray(weight.scale, np.float64), contracted)
    return np.asarray(weight.values, np.float64) * scale


def dequantized_params(params: Params, config: ModelConfig) -> Params:
    """Float32 parameters with the same values as int8 ones."""
    specs = model.param_specs(config)["layers"]
    layers = {
        key: jnp.asarray(dequantized(weight, contracted_axes(key, specs[key])), jnp.float32)
        if isinstance(weight, Int8Weight)
        else weight
        for key, weight in params["layers"].items()
    }
    return params | {"layers": layers}
