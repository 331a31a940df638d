"""The programs of rollouts and evaluations: a copy of the parameters, reading, sampling."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.agent import generate
from opd_jax.agent.generate import Sampling
from opd_jax.config.settings import Settings
from opd_jax.model import KVCache, ModelConfig, cache_specs, is_sharded
from opd_jax.model.attention import BLOCK
from opd_jax.model.cache import Int8Slots
from opd_jax.plan import network
from opd_jax.plan.placement import Placement, device_bytes
from opd_jax.plan.program import Program, Resident, passes
from opd_jax.plan.workload import Workload
from opd_jax.runtime.mesh import DECODING

SAMPLING = "sampling"


@dataclass(frozen=True)
class Player:
    """A model that reads and samples."""

    place: Placement
    sizes: ModelConfig
    params: Any  # abstract
    beside: tuple[Resident, ...]  # the residents other than these parameters

    def cache(self, *, rows: int, slots: int, int8: bool = False) -> Any:
        """What `model.init_cache` returns."""
        place, spec = self.place, cache_specs(self.sizes, batch=rows, slots=slots, int8=int8)
        arrays = partial(place.arrays, rules=DECODING)
        if isinstance(spec, Int8Slots):
            buffer: Any = Int8Slots(arrays(spec.values, "int8"), arrays(spec.scale, "float32"))
        else:
            buffer = arrays(spec, self.params["embed"].dtype)
        buffers = (buffer,) * self.sizes.num_layers
        return KVCache(buffers, buffers, place.rows(rows, rules=DECODING))

    def read(self, name: str, cache: Any, width: int, *, rows: int, runs: float) -> Program:
        """Appends up to `width` tokens to `rows` rows of a cache."""
        inputs = [(width,), (), ()]  # with the numbers of the rows
        return self.program(name, generate.extend, cache, inputs, batch=rows, runs=runs)

    def sample(
        self,
        name: str,
        cache: Any,
        how: Sampling,
        chunk: int,
        *,
        runs: float,
        slots_read: float | None = None,
    ) -> Program:
        """Samples up to `chunk` tokens for every row of a cache; `slots_read` as in `program`."""
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), cache.lengths.size))
        more = self.place.replicated(keys.shape, keys.dtype), self.place.replicated((2,))
        static: dict[str, Any] = {"sampling": how, "chunk": chunk}
        args = generate.generate, cache, [(), ()], *more
        program = self.program(name, *args, runs=runs, times=chunk, slots_read=slots_read, **static)
        return replace(program, trips=(chunk, *program.trips))

    def program(
        self,
        name: str,
        function: Any,
        cache: Any,
        rows: Sequence[tuple[int, ...]],
        *more: Any,
        runs: float,
        times: int = 1,
        batch: int | None = None,
        slots_read: float | None = None,
        **static: Any,
    ) -> Program:
        """A program that passes `times` over all weights and over what its rows read of the cache.

        Of a mixture it reads all experts: with many rows, some token asks for each.

        Args:
          rows: shapes of one row of the arguments that are sharded as a batch.
          more: arguments after these.
          batch: rows of them; None: as many as the cache has.
          slots_read: of each row, the mean; None: all.
          static: keyword arguments beside those that all these programs have.
        """
        # With an untied head, only single rows of the embedding are read.
        read = {k: part for k, part in self.params.items() if k != "embed"}
        weights = device_bytes(read if "head" in self.params else self.params)
        in_cache, slots = cache.lengths.size, cache.slots
        batch, slots_read = batch or in_cache, slots_read or slots
        share = batch / in_cache * slots_read / slots
        return Program(
            name,
            function,
            (
                self.params,
                cache,
                *(self.place.rows(batch, *shape, rules=DECODING) for shape in rows),
                *more,
            ),
            {
                "parameters": passes(weights, times),
                "cache": passes(round(device_bytes((cache.keys, cache.values)) * share), times),
            },
            self.beside,
            runs,
            {"config": self.sizes, "sharded": is_sharded(self.params), **static},
            trips=(slots_read / min(BLOCK, slots),),
            sent=network.decoding(
                self.place,
                self.sizes,
                self.params,
                rows=batch,
                width=math.prod(rows[0]),
                times=times,
            ),
        )


def rows_read(settings: Settings, prefill_rows: int, batch: int) -> int:
    """Rows that one call reads, of all devices; as `agent.contexts` calls it."""
    ways = settings.mesh.decode_shards
    return min(prefill_rows, batch // ways) * ways


def copying(
    settings: Settings, trained: Any, student: Player, beside: tuple[Resident, ...]
) -> Program:
    """The program that makes the copy to sample with from trained parameters."""
    size = device_bytes(student.params)
    static = {
        "config": student.sizes,
        "dtype": jnp.dtype(settings.compute_dtype),
        "gather": settings.rollout.gather_weights,
        "platform": student.place.platform,
    }
    moved = {"parameters": device_bytes(trained), "copy": size}
    name, function = "copy to sample with", generate.sampling_params
    return Program(name, function, (trained,), moved, beside, 1, static, temporaries=size)


def rollout(settings: Settings, player: Player, work: Workload) -> Iterator[Program]:
    """The programs of an update's episodes."""
    decoding = settings.rollout
    at_once = decoding.at_once
    rounds = work.rows / at_once
    cache = player.cache(rows=at_once, slots=work.slots, int8=decoding.int8_cache)
    rows = rows_read(settings, decoding.prefill_rows, at_once)
    first = rounds * at_once / rows
    later = first * (work.turns - 1)
    narrow, wide = decoding.extend_widths[0], decoding.extend_widths[-1]
    if narrow == wide:
        yield player.read("observation", cache, wide, rows=rows, runs=first + later)
    else:
        yield player.read("first message", cache, wide, rows=rows, runs=first)
        yield player.read("observation", cache, narrow, rows=rows, runs=later)
    how, runs = decoding.sampling, rounds * work.sampled / decoding.chunk
    yield player.sample(SAMPLING, cache, how, decoding.chunk, runs=runs, slots_read=work.slots_read)


def evaluation(settings: Settings, who: str, player: Player, work: Workload) -> Iterator[Program]:
    """The programs of an evaluation, which is no part of an update."""
    decoding, name = settings.rollout, f"evaluating the {who}"
    cache = player.cache(rows=settings.eval.batch, slots=work.slots, int8=decoding.int8_cache)
    rows = rows_read(settings, decoding.prefill_rows, settings.eval.batch)
    wide = decoding.extend_widths[-1]
    yield player.read(f"{name}: first message", cache, wide, rows=rows, runs=0)
    how = replace(decoding.sampling, temperature=settings.eval.temperature)
    yield player.sample(f"{name}: sampling", cache, how, decoding.chunk, runs=0)
