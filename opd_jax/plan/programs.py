"""The programs that a run compiles, with abstract arguments placed as the run places them.

They are the very functions that training, rollout, judge and evaluation call, at the largest shapes
of the `Workload`. Nothing here needs a device: a mesh may be abstract.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from opd_jax import experiment, labels, train_step
from opd_jax import generate as gen
from opd_jax.generate import Sampling
from opd_jax.mesh import RULES, AnyMesh, batch_sharding, param_shardings, replicated
from opd_jax.model import KVCache, ModelConfig, is_spec, param_specs
from opd_jax.plan.models import PlannedModel
from opd_jax.plan.traffic import Moved, device_bytes
from opd_jax.plan.workload import Workload, workload
from opd_jax.train_step import Batch


@dataclass(frozen=True)
class Program:
    """One compiled program of a run.

    Attributes:
      name: for tables.
      function: a jitted function.
      args: abstract arguments.
      kwargs: static arguments.
      runs: how often it runs in an update; 0 for what runs beside updates.
      trips: how often its `while` loop runs; None where it has none.
      moved: see `Moved`.
      holds: names of `Run.residents` that are among its arguments.
      temporaries: bytes on each device that it needs beyond its arguments whatever the compiler
        does, as far as they are known.
    """

    name: str
    function: Any
    args: tuple
    kwargs: Mapping[str, Any]
    runs: float
    trips: int | None
    moved: tuple[Moved, ...]
    holds: frozenset[str]
    temporaries: int = 0

    def trace(self) -> Any:
        """Traced, for its jaxpr and to be lowered."""
        return self.function.trace(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Run:
    """All programs of a run, and what stays on the devices while any of them runs.

    Attributes:
      programs: in the order of an update, then those of evaluations.
      residents: bytes on one device by name.
      work: the shapes.
    """

    programs: tuple[Program, ...]
    residents: dict[str, int]
    work: Workload

    def beside(self, program: Program) -> int:
        """Bytes on each device while `program` runs that are not its own."""
        return sum(size for name, size in self.residents.items() if name not in program.holds)


def plan_run(
    config: FrozenConfigDict,
    student: PlannedModel,
    teacher: PlannedModel | None,
    *,
    mesh: AnyMesh,
    layout: str,
) -> Run:
    """Every program that a run of `config` compiles on `mesh`.

    Args:
      config: validated.
      layout: of the cache, as the platform wants it.

    Raises:
      ValueError: a sharded dimension does not divide over the mesh.
    """
    planner = _Planner(config, student, teacher, mesh, layout)
    return Run(tuple(planner.programs()), planner.residents(), planner.work)


class _Planner:
    """What the programs of one config share."""

    def __init__(
        self,
        config: FrozenConfigDict,
        student: PlannedModel,
        teacher: PlannedModel | None,
        mesh: AnyMesh,
        layout: str,
    ):
        self.config, self.student, self.teacher = config, student, teacher
        self.mesh, self.layout = mesh, layout
        self.work = workload(config)
        self.params = abstract_params(student.sizes, config.dtype, mesh)
        self.teacher_params = None
        if teacher is not None:
            self.teacher_params = abstract_params(teacher.sizes, config.teacher_dtype, mesh)
        self.state = train_step.abstract_state(self.params, experiment.make_optimizer(config))

    def residents(self) -> dict[str, int]:
        """What lives as long as the run."""
        return {
            "parameters": device_bytes(self.state.params),
            "optimizer": device_bytes(self.state.opt_state),
            # The student as it was loaded is kept beside the one that is trained.
            "student as loaded": device_bytes(self.params),
            "teacher": device_bytes(self.teacher_params),
        }

    def programs(self) -> Iterable[Program]:
        config, source = self.config, self.config.data.source
        if source in ("on_policy", "teacher"):
            yield from self._rollout("student" if source == "on_policy" else "teacher")
        if config.objective.intervention:
            yield from self._judging()
        yield self._train()
        if config.eval.batch != config.rollout.batch:
            yield from self._evaluation("student")
        if "teacher" in config.eval.who:
            yield from self._evaluation("teacher")

    def _player(self, who: str) -> tuple[ModelConfig, Any, frozenset[str]]:
        """Sizes and parameters of who samples, and which residents those are."""
        if who == "student":
            return self.student.sizes, self.params, frozenset({"parameters"})
        assert self.teacher is not None  # `config.validate` asks for one
        return self.teacher.sizes, self.teacher_params, frozenset({"teacher"})

    # --- Rollout and evaluation

    def _rollout(self, who: str) -> Iterable[Program]:
        rollout, work = self.config.rollout, self.work
        narrow, wide = rollout.extend_widths[0], rollout.extend_widths[-1]
        if narrow == wide:
            yield self._extend("observation", who, work.rows, wide, runs=work.turns)
        else:
            yield self._extend("first message", who, work.rows, wide, runs=1)
            yield self._extend("observation", who, work.rows, narrow, runs=work.turns - 1)
        yield self._sampling(
            "sampling",
            who,
            work.rows,
            temperature=rollout.temperature,
            runs=work.sampled / rollout.chunk,
        )

    def _evaluation(self, who: str) -> Iterable[Program]:
        """Once or twice a run; its rows may be more than those of a batch."""
        rows, name = self.config.eval.batch, f"evaluation of the {who}"
        width = self.config.rollout.extend_widths[-1]
        temperature = self.config.eval.temperature
        yield self._extend(f"{name}: first message", who, rows, width, runs=0)
        yield self._sampling(f"{name}: sampling", who, rows, temperature=temperature, runs=0)

    def _extend(self, name: str, who: str, rows: int, width: int, *, runs: float) -> Program:
        sizes, params, holds = self._player(who)
        cache = self._cache(sizes, params, rows, self.work.slots)
        return self._reading(name, sizes, params, holds, cache, rows, width, runs=runs)

    def _reading(
        self,
        name: str,
        sizes: ModelConfig,
        params: Any,
        holds: frozenset[str],
        cache: KVCache,
        rows: int,
        width: int,
        *,
        runs: float,
    ) -> Program:
        return Program(
            name,
            gen.extend,
            (params, cache, self._rows(rows, width), self._rows(rows)),
            {"config": sizes},
            runs=runs,
            trips=None,
            moved=_read_once(params, cache, times=1),
            holds=holds,
        )

    def _sampling(
        self, name: str, who: str, rows: int, *, temperature: float, runs: float
    ) -> Program:
        sizes, params, holds = self._player(who)
        rollout = self.config.rollout
        return self._generating(
            name,
            sizes,
            params,
            holds,
            self._cache(sizes, params, rows, self.work.slots),
            Sampling(temperature=temperature, top_k=rollout.top_k, top_p=rollout.top_p),
            rollout.chunk,
            runs=runs,
        )

    def _generating(
        self,
        name: str,
        sizes: ModelConfig,
        params: Any,
        holds: frozenset[str],
        cache: KVCache,
        sampling: Sampling,
        chunk: int,
        *,
        runs: float,
    ) -> Program:
        rows = cache.lengths.shape[0]
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
        everywhere = replicated(self.mesh)
        return Program(
            name,
            gen.generate,
            (
                params,
                cache,
                self._rows(rows),
                self._rows(rows),
                jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=everywhere),
                jax.ShapeDtypeStruct((2,), jnp.int32, sharding=everywhere),
            ),
            {"config": sizes, "sampling": sampling, "chunk": chunk},
            runs=runs,
            trips=chunk,
            moved=_read_once(params, cache, times=chunk),
            holds=holds,
        )

    # --- Judging

    def _judging(self) -> Iterable[Program]:
        judge, work = self.config.judge, self.work
        sizes, params, holds = self._player("teacher")
        calls = -(-work.rows * work.turns // judge.batch)  # each answers so many questions
        if judge.context != "history":
            lengths = {"judging": (work.question, calls)}
            if work.longest_question > work.question:
                lengths["judging: longest question"] = (work.longest_question, 0)
            for name, (width, runs) in lengths.items():
                slots = width + self._answer_tokens()
                cache = self._cache(sizes, params, judge.batch, slots)
                yield from self._answering(name, cache, width, runs=runs)
            return
        # One reading of each conversation in pieces, then its questions behind it.
        piece = judge.length_multiple
        rows = min(judge.batch, work.rows)
        batches = -(-work.rows // rows)
        width = work.short_question
        coarse = 4 * piece  # as in `teacher`
        slots = -(-(work.slots + width + self._answer_tokens()) // coarse) * coarse
        cache = self._cache(sizes, params, rows, slots)
        yield self._reading(
            "judging: conversation",
            sizes,
            params,
            holds,
            cache,
            rows,
            piece,
            runs=batches * -(-work.slots // piece),
        )
        yield from self._answering("judging", cache, width, runs=batches * work.turns)

    def _answer_tokens(self) -> int:
        assert self.teacher is not None
        if self.config.judge.decode == "generate":
            return self.config.judge.max_new_tokens
        return self.teacher.label_width

    def _answering(self, name: str, cache: KVCache, width: int, *, runs: float) -> Iterable:
        sizes, params, holds = self._player("teacher")
        rows = cache.lengths.shape[0]
        if self.config.judge.decode == "generate":
            yield self._reading(name, sizes, params, holds, cache, rows, width, runs=runs)
            yield self._generating(
                f"{name}: answer",
                sizes,
                params,
                holds,
                cache,
                Sampling(temperature=0.0, top_k=0, top_p=1.0),
                self.config.judge.max_new_tokens,
                runs=runs,
            )
            return
        words = len(labels.LABELS)
        everywhere = replicated(self.mesh)
        yield Program(
            name,
            labels.label_scores,
            (
                params,
                cache,
                self._rows(rows, width),
                self._rows(rows),
                jax.ShapeDtypeStruct(
                    (words, self._answer_tokens()), jnp.int32, sharding=everywhere
                ),
                jax.ShapeDtypeStruct((words,), jnp.int32, sharding=everywhere),
            ),
            {"config": sizes},
            runs=runs,
            trips=None,
            # Each word is read behind the question.
            moved=_read_once(params, cache, times=1 + words),
            holds=holds,
        )

    # --- The train step

    def _train(self) -> Program:
        config, work, train = self.config, self.work, self.config.train
        objective = experiment.make_objective(config.objective)
        teacher = self.teacher if objective.needs_teacher else None
        teacher_params = self.teacher_params if teacher else None
        players = config.data.source == "players"
        function = train_step.make_train_step(
            student=self.student.sizes,
            teacher=teacher.sizes if teacher else None,
            objective=objective,
            optimizer=experiment.make_optimizer(config),
            placement=train_step.placement_of(self.state),
            micro_batches=train.micro_batches,
            batch_rows=None if players else config.rollout.batch,
            query_chunk=train.query_chunk,
            loss_chunk=train.loss_chunk,
            remat=train.remat,
        )
        batch = Batch(
            tokens=self._rows(work.rows, work.sequence),
            turn_id=self._rows(work.rows, work.sequence),
            sampled_logprobs=self._rows(work.rows, work.sequence, dtype=jnp.float32),
            verdict=self._rows(work.rows, work.turns),
            response=self._rows(work.rows, work.response),
        )
        kept, gradient = self._layer_inputs(), self._gradient()
        return Program(
            "train step",
            function,
            (self.state, teacher_params, batch),
            {},
            runs=1,
            trips=None,
            moved=self._train_traffic(teacher_params, kept=kept, gradient=gradient),
            holds=frozenset({"parameters", "optimizer"} | ({"teacher"} if teacher else set())),
            temporaries=kept + gradient,
        )

    def _gradient(self) -> int:
        """Bytes of the float32 sum over micro-batches, placed as the parameters are."""
        return device_bytes(jax.tree.map(partial(_as, jnp.float32), self.params))

    def _layer_inputs(self) -> int:
        """Bytes of what the backward pass is made from: at least each layer's input."""
        sizes, work, train = self.student.sizes, self.work, self.config.train
        rows = work.rows // train.micro_batches
        inputs = self._rows(rows, work.sequence, sizes.d_model, dtype=self.config.dtype)
        return sizes.num_layers * device_bytes(inputs)

    def _train_traffic(
        self, teacher_params: Any, *, kept: int, gradient: int
    ) -> tuple[Moved, ...]:
        parts, passes = self.config.train.micro_batches, 3 if self.config.train.remat else 2
        parameters = device_bytes(self.params)
        return (
            Moved("parameters, forward and backward", parameters, passes * parts),
            Moved("teacher", device_bytes(teacher_params), parts),
            Moved("inputs of layers, written and read", kept, 2 * parts),
            Moved("gradient, added to", gradient, 2 * parts),
            Moved("optimizer and parameters, updated", self._updated(), 2),
        )

    def _updated(self) -> int:
        return device_bytes((self.state.params, self.state.opt_state))

    # --- Arguments

    def _rows(self, rows: int, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An array whose rows are split over the batch's axes of the mesh."""
        sharding = batch_sharding(self.mesh)
        array = jax.ShapeDtypeStruct((rows, *shape), jnp.dtype(dtype), sharding=sharding)
        try:
            sharding.shard_shape(array.shape)
        except ValueError:
            raise ValueError(
                f"{rows} rows do not divide over `mesh.data` × `mesh.fsdp` = "
                f"{self.mesh.shape['data']} × {self.mesh.shape['fsdp']}; change `rollout.batch`, "
                "`judge.batch`, `eval.batch` or the mesh"
            ) from None
        return array

    def _cache(self, sizes: ModelConfig, params: Any, rows: int, slots: int) -> KVCache:
        return abstract_cache(
            sizes,
            rows=rows,
            slots=slots,
            dtype=params["embed"].dtype,
            layout=self.layout,
            mesh=self.mesh,
        )


def abstract_params(sizes: ModelConfig, dtype: str, mesh: AnyMesh) -> Any:
    """Parameters as they are loaded: shapes, dtype, shardings."""
    specs = param_specs(sizes)
    return jax.tree.map(
        lambda spec, where: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype), sharding=where),
        specs,
        param_shardings(specs, mesh),
        is_leaf=is_spec,
    )


def abstract_cache(
    sizes: ModelConfig, *, rows: int, slots: int, dtype: Any, layout: str, mesh: AnyMesh
) -> KVCache:
    """An empty cache: rows split over the batch's axes, key and value heads over `tensor`."""
    axes = {"B": (rows, "batch"), "G": (sizes.num_kv_heads, "kv_heads")}
    axes |= {"S": (slots, "layer"), "H": (sizes.head_dim, "head_dim")}
    shape = tuple(axes[axis][0] for axis in layout)
    where = NamedSharding(mesh, PartitionSpec(*(RULES[axes[axis][1]] for axis in layout)))
    buffer = jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=batch_sharding(mesh))
    buffers = (buffer,) * sizes.num_layers
    return KVCache(buffers, buffers, lengths, layout)


def _read_once(params: Any, cache: KVCache, *, times: int) -> tuple[Moved, ...]:
    """Going through a model with its cache: all of its weights, and every slot."""
    # Of a table that is not the head as well only single rows are read.
    read = {name: part for name, part in params.items() if name != "embed" or "head" not in params}
    return (
        Moved("parameters", device_bytes(read), times),
        Moved("cache", device_bytes((cache.keys, cache.values)), times),
    )


def _as(dtype: Any, array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, dtype, sharding=array.sharding)
