"""The train step as a program: its arguments, and what it must hold and move."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from opd_jax.config import build as experiment
from opd_jax.learner import train_state, train_step
from opd_jax.learner.batch import Batch
from opd_jax.model import ModelConfig
from opd_jax.plan.placement import Placement
from opd_jax.plan.program import TEACHER, Program
from opd_jax.plan.traffic import Moved, device_bytes
from opd_jax.plan.workload import Workload


def training(
    config: FrozenConfigDict,
    state: Any,
    base: Any,
    student: ModelConfig,
    teacher: ModelConfig | None,
    place: Placement,
    work: Workload,
) -> Program:
    """The update's program.

    Args:
      state: abstract, as from `train_state.abstract_state`.
      base: abstract, the student's own parameters where the state's are adapters; else None.
      teacher: sizes of the teacher that scores; None where the objective needs none.
    """
    train = config.train
    function = train_step.make_train_step(
        student=student,
        teacher=teacher,
        objective=experiment.make_objective(config.objective),
        optimizer=experiment.make_optimizer(config),
        placement=train_state.placement_of(state),
        micro_batches=train.micro_batches,
        batch_rows=None if config.data.source == "players" else config.rollout.batch,
        dtype=jnp.dtype(config.compute_dtype),
        query_chunk=train.query_chunk,
        loss_chunk=train.loss_chunk,
        remat=train.remat,
        lora=experiment.make_lora(config.lora),
    )
    batch = Batch(
        tokens=place.rows(work.rows, work.sequence),
        turn_id=place.rows(work.rows, work.sequence),
        sampled_logprobs=place.rows(work.rows, work.sequence, dtype=jnp.float32),
        verdict=place.rows(work.rows, work.turns),
        response=place.rows(work.rows, work.response),
    )
    teacher_params = teacher and place.params(teacher, config.teacher_dtype)
    held = _held(config, state, student, teacher, place, work)
    return Program(
        "train step",
        function,
        (state, teacher_params, batch, base),
        {},
        runs=1,
        trips=None,
        moved=_moved(config, state, base, teacher_params, work, held),
        beside=() if teacher else (TEACHER,),
        temporaries=held.total,
    )


@dataclass(frozen=True)
class _Held:
    """Bytes on one device that exist at once in the backward pass of the loss.

    Attributes:
      inputs: of each layer, which its own backward pass starts from, however much is kept beside.
      gradient: the sum over micro-batches, float32, placed as the parameters are.
      student_head: whole along `fsdp`.
      head_gradient: the sum over chunks, float32, placed as the head is; none of a frozen one.
      teacher_head: whole along `fsdp`.
    """

    inputs: int
    gradient: int
    student_head: int
    head_gradient: int
    teacher_head: int

    @property
    def total(self) -> int:
        return (
            self.inputs + self.gradient + self.student_head + self.head_gradient + self.teacher_head
        )


def _held(
    config: FrozenConfigDict,
    state: Any,
    student: ModelConfig,
    teacher: ModelConfig | None,
    place: Placement,
    work: Workload,
) -> _Held:
    part = place.rows(
        work.rows // config.train.micro_batches,
        work.sequence,
        student.d_model,
        dtype=config.compute_dtype,
    )
    return _Held(
        inputs=student.num_layers * device_bytes(part),
        gradient=4 * device_bytes(state.params) // jnp.dtype(config.dtype).itemsize,
        student_head=place.head_bytes(student, config.compute_dtype),
        head_gradient=0 if config.lora.rank else place.head_bytes(student, "float32"),
        teacher_head=place.head_bytes(teacher, config.teacher_dtype) if teacher else 0,
    )


def _moved(
    config: FrozenConfigDict,
    state: Any,
    base: Any,
    teacher_params: Any,
    work: Workload,
    held: _Held,
) -> tuple[Moved, ...]:
    train = config.train
    parts, passes = train.micro_batches, 3 if train.remat == "layers" else 2
    chunks = parts * -(-work.rows // parts * work.response // train.loss_chunk)
    return (
        Moved(
            "parameters, forward and backward", device_bytes((state.params, base)), passes * parts
        ),
        Moved("teacher", device_bytes(teacher_params), parts),
        Moved("inputs of layers, written and read", held.inputs, 2 * parts),
        # Forward, recomputed, and for the gradient of the hidden states.
        Moved("student's head, in chunks", held.student_head, 3 * chunks),
        Moved("teacher's head, in chunks", held.teacher_head, 2 * chunks),
        Moved("gradient of the head, in chunks", held.head_gradient, 2 * chunks),
        Moved("gradient, added to", held.gradient, 2 * parts),
        Moved("parameters and optimizer", device_bytes((state.params, state.opt_state)), 2),
    )
