"""The teacher's pass and the train step as programs: what they take, hold and move."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from opd_jax import model
from opd_jax.config.settings import Settings
from opd_jax.learner.batch import Batch
from opd_jax.learner.teacher import Teacher
from opd_jax.model import ModelConfig
from opd_jax.plan.placement import Placement, device_bytes
from opd_jax.plan.program import TEACHER, TEACHER_HEAD, Program, passes
from opd_jax.plan.sampling import Player
from opd_jax.plan.workload import Workload


def training(
    settings: Settings,
    step: Any,
    teacher_pass: Any,
    state: Any,
    base: Any,
    student: ModelConfig,
    teacher: Player | None,
    place: Placement,
    work: Workload,
) -> Iterator[Program]:
    """The update's programs.

    Args:
      step: from `make_train_step`.
      teacher_pass: from `make_teacher_pass`; None if the objective has no teacher.
      state: abstract, from `abstract_state`.
      base: abstract, the student's own parameters if the state's are adapters; else None.
      teacher: None if the objective has no teacher.
    """
    batch, parts = _batch(place, work), settings.train.micro_batches
    if teacher is None:
        yield _train_step(settings, step, state, None, batch, base, student, place, work)
        return
    yield Program(
        "teacher's pass",
        teacher_pass,
        (teacher.params, batch),
        {"teacher": passes(device_bytes(teacher.params), parts)},
        teacher.beside,
        1,
    )
    hidden = place.rows(
        work.rows, work.response, teacher.sizes.d_model, dtype=teacher.params["embed"].dtype
    )
    said = Teacher(hidden, model.head_params(teacher.params))
    yield _train_step(settings, step, state, said, batch, base, student, place, work)


def _train_step(
    settings: Settings,
    step: Any,
    state: Any,
    teacher: Teacher | None,
    batch: Batch,
    base: Any,
    student: ModelConfig,
    place: Placement,
    work: Workload,
) -> Program:
    train, parts = settings.train, settings.train.micro_batches

    def head(dtype: str) -> int:
        """Bytes of the student's head, all-gathered along `fsdp`."""
        # The embedding has the head's shape, and its axes in another order.
        return device_bytes(place.params(student, dtype, gathered=True)["embed"])

    shape = work.rows // parts, work.sequence, student.d_model
    inputs = student.num_layers * device_bytes(place.rows(*shape, dtype=settings.compute_dtype))
    # Summed over micro-batches in float32; sharded as the parameters.
    gradient = 4 * (device_bytes(state.params) // jnp.dtype(settings.dtype).itemsize)
    # Of a head that is trained, summed over chunks in float32.
    head_gradient = 0 if settings.lora.rank else head("float32")
    # All-gathered along `fsdp`, as the student's is.
    teacher_head = device_bytes(teacher.head) * settings.mesh.fsdp if teacher else 0
    chunks = parts * -(-work.rows // parts * work.response // train.loss_chunk)
    # What exists at once in the backward pass: bytes, and passes over them.
    held = {
        "inputs of layers": (inputs, 2 * parts),
        "gradient": (gradient, 2 * parts),
        # Read for logits, for logits again, and for the gradient of hidden states.
        "student's head": (head(settings.compute_dtype), 3 * chunks),
        "gradient of the head": (head_gradient, 2 * chunks),
        "teacher's head": (teacher_head, 2 * chunks),
    }
    forward_and_backward = parts * (3 if train.remat == "layers" else 2)
    arrays = held | {
        "parameters": (device_bytes((state.params, base)), forward_and_backward),
        "optimizer": (device_bytes((state.params, state.opt_state)), 2),
    }
    return Program(
        "train step",
        step,
        (state, teacher, batch, base),
        {name: passes(*array) for name, array in arrays.items()},
        (TEACHER,) if teacher else (TEACHER, TEACHER_HEAD),
        1,
        temporaries=sum(size for size, _ in held.values()),
    )


def _batch(place: Placement, work: Workload) -> Batch:
    return Batch(
        tokens=place.rows(work.rows, work.sequence),
        turn_id=place.rows(work.rows, work.sequence),
        sampled_logprobs=place.rows(work.rows, work.sequence, dtype=jnp.float32),
        verdict=place.rows(work.rows, work.turns),
        response=place.rows(work.rows, work.response),
    )
