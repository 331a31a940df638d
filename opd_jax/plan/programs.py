"""The programs that a run compiles, with abstract arguments placed as the run places them.

They are the very functions that training, rollout, judge and evaluation call, at the largest shapes
of the `Workload`. Nothing here needs a device: a mesh may be abstract.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from opd_jax import experiment, labels, model, train_step
from opd_jax import generate as gen
from opd_jax.generate import Sampling
from opd_jax.mesh import (
    RULES,
    SAMPLING_RULES,
    AnyMesh,
    Rules,
    batch_sharding,
    param_shardings,
    replicated,
)
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
      beside: names of `Run.residents` that stand beside its arguments while it runs.
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
    beside: tuple[str, ...]
    temporaries: int = 0


@dataclass(frozen=True)
class Run:
    """All programs of a run, and what stays on the devices between them.

    Attributes:
      programs: in the order of an update, then those of evaluations.
      residents: bytes on one device by name.
      work: the shapes.
      mesh: that they are placed on.
    """

    programs: tuple[Program, ...]
    residents: dict[str, int]
    work: Workload
    mesh: AnyMesh

    def beside(self, program: Program) -> int:
        """Bytes on each device while `program` runs that are not its own."""
        return sum(self.residents[name] for name in program.beside)

    def trace(self, program: Program) -> Any:
        """A program traced, for its jaxpr and to be lowered."""
        with _current(self.mesh):
            return program.function.trace(*program.args, **program.kwargs)

    def compile(self, program: Program) -> Any:
        """A program compiled for the devices of the mesh, which is then not abstract."""
        with _current(self.mesh):
            return program.function.trace(*program.args, **program.kwargs).lower().compile()

    def lower(self, traced: Any, *, platform: str) -> Any:
        """A traced program lowered for a platform, which need not be here."""
        with _current(self.mesh):
            return traced.lower(lowering_platforms=(platform,))


def _current(mesh: AnyMesh) -> AbstractContextManager:
    """As a run sets its mesh."""
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh)


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
    return Run(tuple(planner.programs()), planner.residents(), planner.work, mesh)


# What lives as long as the run. The student as it was loaded is kept beside the one that is
# trained.
_PARAMETERS, _OPTIMIZER, _LOADED, _TEACHER = (
    "parameters",
    "optimizer",
    "student as loaded",
    "teacher",
)
_ALWAYS = (_PARAMETERS, _OPTIMIZER, _LOADED, _TEACHER)
_COPY = "copy to sample with"


@dataclass(frozen=True)
class _Player:
    """Who samples or answers.

    Attributes:
      sizes: of the model.
      params: abstract.
      beside: names of residents that are not these parameters.
    """

    sizes: ModelConfig
    params: Any
    beside: tuple[str, ...]


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
        gathered = config.rollout.gather_weights
        self.sampling_params = abstract_params(
            student.sizes,
            config.compute_dtype,
            mesh,
            rules=SAMPLING_RULES if gathered else RULES,
        )

    def residents(self) -> dict[str, int]:
        return {
            _PARAMETERS: device_bytes(self.state.params),
            _OPTIMIZER: device_bytes(self.state.opt_state),
            _LOADED: device_bytes(self.params),
            _TEACHER: device_bytes(self.teacher_params),
            _COPY: device_bytes(self.sampling_params),
        }

    def programs(self) -> Iterable[Program]:
        config, source = self.config, self.config.data.source
        if source == "on_policy":
            yield self._copying()
            yield from self._rollout(self._sampling_student())
        elif source == "teacher":
            yield from self._rollout(self._frozen_teacher())
        if config.objective.intervention:
            yield from self._judging()
        yield self._train()
        if source != "on_policy" or config.eval.batch != config.rollout.batch:
            yield from self._evaluation("student", self._sampling_student())
        if "teacher" in config.eval.who:
            # Evaluated with the student, whose copy waits meanwhile.
            yield from self._evaluation("teacher", self._frozen_teacher(_COPY))

    def _sampling_student(self) -> _Player:
        return _Player(self.student.sizes, self.sampling_params, _ALWAYS)

    def _frozen_teacher(self, *more: str) -> _Player:
        assert self.teacher is not None  # `config.validate` asks for one
        others = (_PARAMETERS, _OPTIMIZER, _LOADED, *more)
        return _Player(self.teacher.sizes, self.teacher_params, others)

    # --- Rollout and evaluation

    def _copying(self) -> Program:
        sizes, source = self.student.sizes, device_bytes(self.params)
        copy = device_bytes(self.sampling_params)
        return Program(
            "copy to sample with",
            gen.sampling_params,
            (self.params,),
            {
                "config": sizes,
                "dtype": jnp.dtype(self.config.compute_dtype),
                "gather": self.config.rollout.gather_weights,
            },
            runs=1,
            trips=None,
            moved=(Moved("parameters", source, 1), Moved("copy", copy, 1)),
            beside=(_OPTIMIZER, _LOADED, _TEACHER),
            temporaries=copy,
        )

    def _rollout(self, player: _Player) -> Iterable[Program]:
        rollout, work = self.config.rollout, self.work
        narrow, wide = rollout.extend_widths[0], rollout.extend_widths[-1]
        cache = self._cache(player, work.rows, work.slots)
        if narrow == wide:
            yield self._reading("observation", player, cache, wide, runs=work.turns)
        else:
            yield self._reading("first message", player, cache, wide, runs=1)
            yield self._reading("observation", player, cache, narrow, runs=work.turns - 1)
        calls = work.sampled / rollout.chunk
        yield self._sampling("sampling", player, cache, rollout.temperature, runs=calls)

    def _evaluation(self, who: str, player: _Player) -> Iterable[Program]:
        """Once or twice a run; its rows may be more than those of a batch."""
        evaluation, width = self.config.eval, self.config.rollout.extend_widths[-1]
        cache = self._cache(player, evaluation.batch, self.work.slots)
        yield self._reading(f"evaluating the {who}: first message", player, cache, width, runs=0)
        name = f"evaluating the {who}: sampling"
        yield self._sampling(name, player, cache, evaluation.temperature, runs=0)

    def _reading(
        self, name: str, player: _Player, cache: KVCache, width: int, *, runs: float
    ) -> Program:
        """Appending up to `width` tokens to every row."""
        rows = cache.lengths.shape[0]
        return Program(
            name,
            gen.extend,
            (player.params, cache, self._rows(rows, width), self._rows(rows)),
            {"config": player.sizes},
            runs=runs,
            trips=None,
            moved=_gone_through(player.params, cache, times=1),
            beside=player.beside,
        )

    def _sampling(
        self, name: str, player: _Player, cache: KVCache, temperature: float, *, runs: float
    ) -> Program:
        rollout = self.config.rollout
        how = Sampling(temperature=temperature, top_k=rollout.top_k, top_p=rollout.top_p)
        return self._generating(name, player, cache, how, rollout.chunk, runs=runs)

    def _generating(
        self,
        name: str,
        player: _Player,
        cache: KVCache,
        how: Sampling,
        chunk: int,
        *,
        runs: float,
    ) -> Program:
        rows = cache.lengths.shape[0]
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
        return Program(
            name,
            gen.generate,
            (
                player.params,
                cache,
                self._rows(rows),
                self._rows(rows),
                self._whole(keys.shape, keys.dtype),
                self._whole((2,)),  # a turn ends with one of one or two tokens
            ),
            {"config": player.sizes, "sampling": how, "chunk": chunk},
            runs=runs,
            trips=chunk,
            moved=_gone_through(player.params, cache, times=chunk),
            beside=player.beside,
        )

    # --- Judging

    def _judging(self) -> Iterable[Program]:
        judge, work, teacher = self.config.judge, self.work, self._frozen_teacher()
        if judge.context != "history":
            calls = -(-work.rows * work.turns // judge.batch)
            lengths = {"judging": (work.question, calls)}
            if work.longest_question > work.question:
                lengths["judging: longest question"] = (work.longest_question, 0)
            for name, (width, runs) in lengths.items():
                cache = self._cache(teacher, judge.batch, width + self._answer_tokens())
                yield from self._answering(name, teacher, cache, width, runs=runs)
            return
        # Conversations are read in pieces, then the questions behind them.
        piece, width = judge.length_multiple, work.short_question
        rows = min(judge.batch, work.rows)
        calls = -(-work.rows // rows)
        coarse = 4 * piece  # as in `teacher`
        slots = -(-(work.slots + width + self._answer_tokens()) // coarse) * coarse
        cache = self._cache(teacher, rows, slots)
        pieces = calls * -(-work.slots // piece)
        yield self._reading("judging: conversation", teacher, cache, piece, runs=pieces)
        yield from self._answering("judging", teacher, cache, width, runs=calls * work.turns)

    def _answer_tokens(self) -> int:
        assert self.teacher is not None
        if self.config.judge.decode == "generate":
            return self.config.judge.max_new_tokens
        return self.teacher.label_width

    def _answering(
        self, name: str, teacher: _Player, cache: KVCache, width: int, *, runs: float
    ) -> Iterable[Program]:
        if self.config.judge.decode == "generate":
            greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0)
            most = self.config.judge.max_new_tokens
            yield self._reading(name, teacher, cache, width, runs=runs)
            yield self._generating(f"{name}: answer", teacher, cache, greedy, most, runs=runs)
            return
        words, rows = len(labels.LABELS), cache.lengths.shape[0]
        yield Program(
            name,
            labels.label_scores,
            (
                teacher.params,
                cache,
                self._rows(rows, width),
                self._rows(rows),
                self._whole((words, self._answer_tokens())),
                self._whole((words,)),
            ),
            {"config": teacher.sizes},
            runs=runs,
            trips=None,
            # Each word is read behind the question.
            moved=_gone_through(teacher.params, cache, times=1 + words),
            beside=teacher.beside,
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
            dtype=jnp.dtype(config.compute_dtype),
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
        return Program(
            "train step",
            function,
            (self.state, teacher_params, batch),
            {},
            runs=1,
            trips=None,
            moved=self._train_traffic(teacher_params),
            beside=(_LOADED,) if teacher else (_LOADED, _TEACHER),
            temporaries=self._layer_inputs() + self._gradient() + sum(self._heads(teacher_params)),
        )

    def _gradient(self) -> int:
        """Bytes of the float32 sum over micro-batches, placed as the parameters are."""
        return device_bytes(abstract_params(self.student.sizes, "float32", self.mesh))

    def _layer_inputs(self) -> int:
        """Bytes of what the backward pass starts from: at least each layer's input."""
        sizes, work, train = self.student.sizes, self.work, self.config.train
        rows, dtype = work.rows // train.micro_batches, self.config.compute_dtype
        inputs = self._rows(rows, work.sequence, sizes.d_model, dtype=dtype)
        return sizes.num_layers * device_bytes(inputs)

    def _heads(self, teacher_params: Any) -> tuple[int, int, int]:
        """Bytes of what the loss goes through in chunks, whole along `fsdp`.

        The student's head, its gradient in float32, and the teacher's head.
        """
        student = _head_bytes(self.student.sizes, self.params, self.mesh)
        gradient = student * 4 // self.params["embed"].dtype.itemsize
        if teacher_params is None:
            return student, gradient, 0
        assert self.teacher is not None
        return student, gradient, _head_bytes(self.teacher.sizes, teacher_params, self.mesh)

    def _train_traffic(self, teacher_params: Any) -> tuple[Moved, ...]:
        work, train = self.work, self.config.train
        parts, passes = train.micro_batches, 3 if train.remat else 2
        chunks = -(-work.rows // parts * work.response // train.loss_chunk)
        student_head, head_gradient, teacher_head = self._heads(teacher_params)
        updated = device_bytes((self.state.params, self.state.opt_state))
        return (
            Moved("parameters, forward and backward", device_bytes(self.params), passes * parts),
            Moved("teacher", device_bytes(teacher_params), parts),
            Moved("inputs of layers, written and read", self._layer_inputs(), 2 * parts),
            # Forward, recomputed, and for the gradient of the hidden states.
            Moved("student's head, in chunks", student_head, 3 * chunks * parts),
            Moved("teacher's head, in chunks", teacher_head, 2 * chunks * parts),
            Moved("gradient of the head, in chunks", head_gradient, 2 * chunks * parts),
            Moved("gradient, added to", self._gradient(), 2 * parts),
            Moved("optimizer and parameters, updated", updated, 2),
        )

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

    def _whole(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.mesh))

    def _cache(self, player: _Player, rows: int, slots: int) -> KVCache:
        return abstract_cache(
            player.sizes,
            rows=rows,
            slots=slots,
            dtype=player.params["embed"].dtype,
            layout=self.layout,
            mesh=self.mesh,
        )


def abstract_params(sizes: ModelConfig, dtype: str, mesh: AnyMesh, *, rules: Rules = RULES) -> Any:
    """Parameters as they are loaded, or copied: shapes, dtype, shardings."""
    specs = param_specs(sizes)
    return jax.tree.map(
        lambda spec, where: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype), sharding=where),
        specs,
        param_shardings(specs, mesh, rules=rules),
        is_leaf=is_spec,
    )


def abstract_cache(
    sizes: ModelConfig, *, rows: int, slots: int, dtype: Any, layout: str, mesh: AnyMesh
) -> KVCache:
    """`model.init_cache` without its arrays."""
    spec = model.cache_specs(sizes, batch=rows, slots=slots, layout=layout)
    where = param_shardings({"keys and values of the cache": spec}, mesh)
    (placed,) = where.values()
    buffer = jax.ShapeDtypeStruct(spec.shape, dtype, sharding=placed)
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=batch_sharding(mesh))
    buffers = (buffer,) * sizes.num_layers
    return KVCache(buffers, buffers, lengths, layout)


def _gone_through(params: Any, cache: KVCache, *, times: int) -> tuple[Moved, ...]:
    """All of a model's weights, and every slot of its cache."""
    # Of a table that is not the head as well only single rows are read.
    read = {name: part for name, part in params.items() if name != "embed" or "head" not in params}
    return (
        Moved("parameters", device_bytes(read), times),
        Moved("cache", device_bytes((cache.keys, cache.values)), times),
    )


def _head_bytes(sizes: ModelConfig, params: Any, mesh: AnyMesh) -> int:
    """Bytes on one device of an output head that is whole along `fsdp`."""
    embed = abstract_params(sizes, params["embed"].dtype, mesh, rules=SAMPLING_RULES)["embed"]
    return device_bytes(embed)
