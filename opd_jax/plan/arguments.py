"""Arrays in place of a planned program's abstract arguments, so that it can be run."""

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.learner.batch import Batch
from opd_jax.losses import NO_TURN, Verdict
from opd_jax.model import KVCache
from opd_jax.model.attention import BLOCK
from opd_jax.plan.program import Program


class Arguments:
    """The arguments of a program, from one run to the next: what it donates, it gives back.

    Weights are random and small. Every row has work: it reads or samples as many tokens as the
    shapes hold, up to the slots that the plan counts.
    """

    def __init__(self, program: Program):
        self.program = program
        names = inspect.signature(program.function).parameters
        self.arrays = {
            name: _made(name, argument, program)
            for name, argument in zip(names, program.args, strict=False)
        }

    def run(self) -> None:
        """Runs the program and waits for it."""
        cache = self.arrays.get("cache")
        if cache is not None:  # every run starts where the first did
            lengths = _made("lengths", self.program.args[1].lengths, self.program)
            self.arrays["cache"] = replace(cache, lengths=lengths)
        result = self.program.function(*self.arrays.values(), **self.program.static)
        jax.block_until_ready(result)
        parts = result if type(result) is tuple else (result,)
        for name in ("cache", "state"):  # what programs donate
            if name in self.arrays:
                kind = type(self.arrays[name])
                self.arrays[name] = next(part for part in parts if isinstance(part, kind))


def _made(name: str, abstract: Any, program: Program) -> Any:
    """An array, or a tree of them, for the argument of this name."""
    if isinstance(abstract, KVCache):
        return replace(
            jax.tree.map(_zeros, abstract), lengths=_made("lengths", abstract.lengths, program)
        )
    if isinstance(abstract, Batch):
        return jax.tree.map(_placed, abstract, _batch(abstract))
    if name in _INTEGERS:
        return _placed(abstract, np.broadcast_to(_INTEGERS[name](program), abstract.shape))
    seeds = itertools.count()
    return jax.tree.map(lambda leaf: _random(leaf, next(seeds)), abstract)


def _new(program: Program) -> int:
    """Tokens that a run appends to each row of a cache."""
    shape = program.args[2].shape  # of the tokens, or one token a row
    return program.static.get("chunk", shape[1] if len(shape) > 1 else 1)


def _held(program: Program) -> int:
    """Tokens of each row before a run."""
    slots_read = round(program.trips[-1] * BLOCK)
    return max(min(slots_read, program.args[1].slots) - _new(program), 0)


def _rows(program: Program) -> np.ndarray:
    """Rows of the cache that read: the first ones of each device."""
    at_once, place = program.args[2].shape[0], program.args[2].sharding
    shards = at_once // place.shard_shape((at_once,))[0]
    size = program.args[1].lengths.size // shards
    return (np.arange(shards)[:, None] * size + np.arange(at_once // shards)).reshape(-1)


# Arguments whose values decide how much a program does.
_INTEGERS: dict[str, Callable[[Program], Any]] = {
    "lengths": _held,
    "counts": _new,
    "budget": _new,
    "rows": _rows,
    "asked": lambda _: 1,
    "stop_ids": lambda _: -1,
    "word_lengths": lambda program: program.args[4].shape[1],
}


def _batch(abstract: Batch) -> Batch:
    """Rows that end with their responses; every turn is STRONG, so every token has a weight."""
    rows, length = abstract.tokens.shape
    response, turns = abstract.response.shape[1], abstract.verdict.shape[1]
    turn_id = np.full((rows, length), NO_TURN)
    turn_id[:, -response:] = np.arange(response) * turns // response
    return Batch(
        tokens=np.ones((rows, length), np.int32),
        turn_id=turn_id.astype(np.int32),
        sampled_logprobs=np.full((rows, length), -1.0, np.float32),
        verdict=np.full((rows, turns), Verdict.STRONG, np.int32),
        response=np.broadcast_to(
            np.arange(length - response, length, dtype=np.int32), (rows, response)
        ),
        labels={name: np.ones(x.shape, np.float32) for name, x in abstract.labels.items()},
        actor=None if abstract.actor is None else np.zeros((rows, turns), np.int32),
    )


def _placed(abstract: Any, value: Any) -> jax.Array:
    array = np.asarray(value, abstract.dtype)
    return jax.make_array_from_callback(array.shape, abstract.sharding, array.__getitem__)


def _zeros(abstract: Any) -> jax.Array:
    return jax.jit(
        partial(jnp.zeros, abstract.shape, abstract.dtype), out_shardings=abstract.sharding
    )()


def _random(abstract: Any, seed: int) -> jax.Array:
    """Normal weights, each shard made where it lives; a counter is 0, a key is a key."""

    def make() -> jax.Array:
        key, shape = jax.random.key(seed), abstract.shape
        if jnp.issubdtype(abstract.dtype, jax.dtypes.prng_key):
            return jax.random.split(key, shape) if shape else key
        if jnp.issubdtype(abstract.dtype, jnp.floating):
            return 0.02 * jax.random.normal(key, shape, abstract.dtype)
        return jnp.full(shape, 1 if math.prod(shape) > 1 else 0, abstract.dtype)

    return jax.jit(make, out_shardings=abstract.sharding)()
