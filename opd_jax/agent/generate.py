"""Token generation over a kept cache: append observations, sample responses. No text here.

A conversation is a list of tokens; the first `cache.lengths` of them are in the cache. The last
token is always held back: `extend` appends everything new except that one, and `generate` feeds it
to get the first logits. After a turn the cache holds all tokens but the last sampled one. The next
`extend` starts with that one, so nothing is prefilled twice.

The two functions serve any number of turns. Each is compiled once per shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from opd_jax import model
from opd_jax.model import KVCache, Model, ModelConfig, Params, lora
from opd_jax.model.projections import cast
from opd_jax.runtime.fields import check_within
from opd_jax.runtime.mesh import DECODING, constrain, gathered, replicate


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; static under `jit`.

    Attributes:
      temperature: 0 is greedy.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of most likely tokens with at least this mass; 1 keeps all.
    """

    temperature: float
    top_k: int
    top_p: float

    def __post_init__(self):
        check_within(0, temperature=self.temperature, top_k=self.top_k)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p`: expected above 0 and at most 1, got {self.top_p}")

    @property
    def greedy(self) -> bool:
        """Whether only the most likely token can be drawn.

        It has at least the mean mass, so a `top_p` up to 1e-6 keeps it alone in any vocabulary of
        up to a million tokens.
        """
        return self.temperature == 0 or self.top_k == 1 or self.top_p <= 1e-6


@struct.dataclass
class Sampled:
    """Up to C tokens a row from one call of `generate`.

    Attributes:
      tokens: int32 [B, C]; row b holds `counts[b]`, the rest is 0.
      logprobs: float32 [B, C], nats, at temperature 1 and before top-k and top-p. The update
        recomputes these.
      counts: int32 [B].
      stopped: bool [B], whether the last token is a stop token.
    """

    tokens: jax.Array
    logprobs: jax.Array
    counts: jax.Array
    stopped: jax.Array

    @property
    def computed(self) -> int:
        """Positions computed: every row takes as many steps as the longest response."""
        return len(self.counts) * int(self.counts.max())


@partial(jax.jit, static_argnames=("config", "dtype", "gather", "platform"))
def sampling_params(
    params: Params, *, config: ModelConfig, dtype: jnp.dtype, gather: bool, platform: str
) -> Params:
    """A copy of the parameters to sample with (`for_decoding`).

    Adapters stay beside the weights they adapt. A sum of the two would be rounded: in bfloat16 the
    log-probabilities would differ from those that the update recomputes.

    Args:
      dtype: compute dtype.
      gather: all-gather weights along `fsdp` first, so that no token waits for weights. If false
        they stay sharded: less memory.
      platform: JAX's name for where it is sampled (`jax.default_backend`).
    """
    rules = gathered(DECODING) if gather else DECODING
    copy = jax.tree.map(
        lambda spec, p: constrain(p, *spec.axes, rules=rules),
        lora.specs_like(params, config),
        cast(params, dtype),
        is_leaf=model.is_spec,
    )
    return for_decoding(copy, platform=platform)


@partial(jax.jit, static_argnames="platform")
def for_decoding(params: Params, *, platform: str) -> Params:
    """The parameters as decoding reads them: unstacked, and on a CPU the head as [D, V].

    A CPU takes twice as long for a product with a transposed head, for every token.
    """
    params = model.unstack(params)
    if platform == "cpu" and "head" not in params:
        params |= {"head": model.head(params)}
    return params


@partial(jax.jit, static_argnames=("config", "sharded"), donate_argnames="cache")
def extend(
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    counts: jax.Array,
    rows: jax.Array | None = None,
    *,
    config: ModelConfig | Model,
    sharded: bool,
) -> KVCache:
    """Appends the first `counts[b]` of `tokens[b]` to each conversation. The cache is donated.

    Arguments as in `model.forward_cached`.
    """
    return model.append(params, cache, tokens, counts, config=config, sharded=sharded, rows=rows)[1]


@partial(
    jax.jit,
    static_argnames=("config", "sampling", "chunk", "sharded"),
    donate_argnames="cache",
)
def generate(
    params: Params,
    cache: KVCache,
    last_token: jax.Array,
    budget: jax.Array,
    row_keys: jax.Array,
    stop_ids: jax.Array,
    *,
    config: ModelConfig | Model,
    sampling: Sampling,
    chunk: int,
    sharded: bool,
) -> tuple[KVCache, Sampled]:
    """Samples until a stop token or the budget, at most `chunk` tokens. The cache is donated.

    Args:
      last_token: int32 [B], the token held back (see the module).
      budget: int32 [B], tokens a row may still sample; 0 leaves the row untouched. The caller
        keeps `lengths + min(budget, chunk) <= slots`.
      row_keys: PRNG keys [B]. A token's key is its row's key folded with its position, so a sample
        does not depend on the other rows, on `chunk` or on the number of calls.
      stop_ids: int32 [any]; such a token ends a row's turn and belongs to it.
      chunk: C, static.
      sharded: see `model.forward_cached`.

    Returns:
      (cache, `Sampled`). To go on with rows that neither stopped nor spent their budget, call
      again with their last sampled token as `last_token`.
    """
    if isinstance(config, ModelConfig):
        params = model.unstack(params)  # here, not in the loop
    rows = last_token.shape[0]
    empty = Sampled(
        tokens=jnp.zeros((rows, chunk), jnp.int32),
        logprobs=jnp.zeros((rows, chunk), jnp.float32),
        counts=jnp.zeros(rows, jnp.int32),
        stopped=jnp.zeros(rows, bool),
    )

    # Once for all tokens: how far the longest row may come.
    slots_read = model.longest(cache.lengths, jnp.minimum(budget, chunk))

    def alive(out: Sampled) -> jax.Array:
        return ~out.stopped & (out.counts < budget)

    def unfinished(carry) -> jax.Array:
        step, _, _, out = carry
        return (step < chunk) & jnp.any(alive(out))

    def sample_one(carry):
        step, cache, token, out = carry
        going = alive(out)
        hidden, cache = model.append(
            params,
            cache,
            token[:, None],
            going.astype(jnp.int32),
            config=config,
            sharded=sharded,
            slots_read=slots_read,
        )
        logits = model.logits(params, hidden[:, 0], sharded=sharded, head=model.head_of(config))
        keys = jax.vmap(jax.random.fold_in)(row_keys, cache.lengths)
        sampled, logprob = sample(logits, keys, sampling=sampling, unused_ids=config.unused_ids)
        token = jnp.where(going, sampled, token)
        out = Sampled(
            tokens=out.tokens.at[:, step].set(jnp.where(going, sampled, 0)),
            logprobs=out.logprobs.at[:, step].set(jnp.where(going, logprob, 0.0)),
            counts=out.counts + going,
            stopped=out.stopped | (going & jnp.any(token[:, None] == stop_ids, axis=1)),
        )
        return step + 1, cache, token, out

    _, cache, _, out = jax.lax.while_loop(unfinished, sample_one, (0, cache, last_token, empty))
    return cache, replicate(out)


def sample(
    logits: jax.Array,
    row_keys: jax.Array,
    *,
    sampling: Sampling,
    unused_ids: Sequence[tuple[int, int]] = (),
) -> tuple[jax.Array, jax.Array]:
    """Draws one token a row by inverting the cumulative distribution.

    This takes one uniform number a row; the Gumbel trick takes one a logit. With a large vocabulary
    on a CPU this is several times cheaper.

    Args:
      logits: float32 [B, V].
      row_keys: PRNG keys [B].
      unused_ids: ranges [start, stop) of ids that are never drawn; see `ModelConfig`.

    Returns:
      (token int32 [B], logprob float32 [B] of the model's own distribution; see `Sampled`).
    """
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    log_total = jnp.log(jnp.sum(weights, axis=-1))
    allowed = logits
    if unused_ids:
        used = np.ones(logits.shape[-1], bool)
        for start, stop in unused_ids:
            used[start:stop] = False
        allowed = jnp.where(used, logits, -jnp.inf)
    if sampling.temperature == 0:
        # Not `argmax`: a CPU takes ten times as long for it.
        best, vocab = jnp.max(allowed, axis=-1, keepdims=True), logits.shape[-1]
        token = jnp.min(jnp.where(allowed == best, jnp.arange(vocab), vocab), axis=-1)
    else:
        if sampling.temperature != 1 or unused_ids:
            weights = jnp.exp((allowed - top) / sampling.temperature)
        draws = jax.vmap(jax.random.uniform)(row_keys)
        token = _draw(_filter(weights, sampling), draws)
    logprob = jnp.take_along_axis(logits - top, token[:, None], axis=-1)[:, 0] - log_total
    return token.astype(jnp.int32), logprob


# A cumulative sum over a whole vocabulary takes several passes over it on a CPU. So sum blocks of
# so many tokens, and accumulate within the drawn block alone.
_DRAW_BLOCK = 128


def _draw(weights: jax.Array, draws: jax.Array) -> jax.Array:
    """The token in which a share `draws` [B], in [0, 1), of the total of `weights` [B, V] falls.

    A sum may rise by a last bit where 0 is added. So what has no weight is also masked.
    """
    rows, vocab = weights.shape
    weights = jnp.pad(weights, ((0, 0), (0, -vocab % _DRAW_BLOCK)))
    blocks = weights.reshape(rows, -1, _DRAW_BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    block, rest = _first_beyond(sums, draws * jnp.cumsum(sums, axis=-1)[:, -1])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _DRAW_BLOCK + _first_beyond(inside, rest)[0]


def _first_beyond(weights: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The index at which cumulative `weights` [B, n] exceed `share` [B], and what is left of it.

    If rounding lets none exceed it, the last that has weight.
    """
    cumulative, some = jnp.cumsum(weights, axis=-1), weights > 0
    index = jnp.arange(weights.shape[-1])
    beyond = some & (cumulative > share[:, None])
    last = jnp.max(jnp.where(some, index, 0), axis=-1)
    first = jnp.min(jnp.where(beyond, index, last[:, None]), axis=-1)
    before = jnp.where(index < first[:, None], weights, 0.0).sum(axis=-1)
    return first, share - before


def _filter(weights: jax.Array, sampling: Sampling) -> jax.Array:
    """Zeroes what top-k and then top-p drop; ties with the last kept token are kept."""
    if sampling.top_k:
        k = min(sampling.top_k, weights.shape[-1])
        least = jax.lax.top_k(weights, k)[0][:, -1:]
        weights = jnp.where(weights >= least, weights, 0.0)
    if sampling.top_p < 1:
        descending = -jnp.sort(-weights, axis=-1)
        total = jnp.sum(descending, axis=-1, keepdims=True)
        before = jnp.cumsum(descending, axis=-1) - descending
        kept = jnp.where(before < sampling.top_p * total, descending, jnp.inf)
        weights = jnp.where(weights >= jnp.min(kept, axis=-1, keepdims=True), weights, 0.0)
    return weights
