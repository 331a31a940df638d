"""The teacher's pass and the train step as programs: what they take, hold and move."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from opd_jax import model
from opd_jax.config.settings import Settings
from opd_jax.learner.batch import Batch
from opd_jax.learner.teacher import Teacher
from opd_jax.plan import network
from opd_jax.plan.placement import Placement, device_bytes
from opd_jax.plan.program import Program, passes
from opd_jax.plan.sampling import Player
from opd_jax.plan.workload import Workload
from opd_jax.runtime.mesh import TRAINING, gathered


def training(
    settings: Settings,
    step: Any,
    teacher_pass: Any,
    state: Any,
    base: Any,
    student: Player,
    teacher: Player | None,
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
    batch, train, said = _batch(settings, student.place, work), settings.train, None
    parts = train.micro_batches
    if teacher:
        moved = {"teacher": passes(device_bytes(teacher.params), train.micro_batches)}
        told = dataclasses.replace(batch, tokens=student.place.rows(work.rows, work.read))
        args, sizes, dtype = (teacher.params, told), teacher.sizes, teacher.params["embed"].dtype
        sent = network.training(
            teacher.place,
            sizes,
            teacher.params,
            None,
            passes=1,
            dtype=dtype,
            tokens=work.rows * work.read,
            parts=parts,
        )
        # A copy that is sharded for training, if it is kept otherwise.
        copy = device_bytes(teacher.params) if settings.mesh.axes["decode"] > 1 else 0
        more: dict[str, Any] = dict(sent=sent, temporaries=copy)
        if not settings.judges_what_it_scores:
            yield Program("teacher's pass", teacher_pass, args, moved, teacher.beside, 1, **more)
        shape = work.rows, work.response, sizes.d_model
        hidden = student.place.rows(*shape, dtype=dtype)
        said = Teacher(hidden, model.head_params(teacher.params))
    held = _held(settings, state, student, said, work)
    forward_and_backward = 3 if train.remat == "layers" else 2
    read = train.micro_batches * forward_and_backward
    arrays = held | {
        "parameters": (device_bytes((state.params, base)), read),
        "optimizer": (device_bytes((state.params, state.opt_state)), 2),
    }
    yield Program(
        "train step",
        step,
        (state, said, batch, base),
        {name: passes(*array) for name, array in arrays.items()},
        ("teacher's body",) if said else ("teacher's body", "teacher's head"),
        1,
        sent=network.training(
            student.place,
            student.sizes,
            (state.params, base),
            state.params,
            passes=forward_and_backward,
            dtype=jnp.dtype(settings.compute_dtype),
            tokens=work.rows * work.sequence,
            parts=parts,
        ),
        temporaries=sum(size for size, _ in held.values()),
    )


def _held(
    settings: Settings, state: Any, student: Player, said: Teacher | None, work: Workload
) -> dict[str, tuple[int, int]]:
    """What exists at once in the backward pass: bytes on a device, and passes over them."""
    train, parts, sizes = settings.train, settings.train.micro_batches, student.sizes

    def head(dtype: str) -> int:
        """Bytes of the student's head, all-gathered along `fsdp`."""
        # The embedding has the head's shape, and its axes in another order.
        return device_bytes(student.place.params(sizes, dtype, rules=gathered(TRAINING))["embed"])

    shape = work.rows // parts, work.sequence, sizes.d_model
    inputs = device_bytes(student.place.rows(*shape, dtype=settings.compute_dtype))
    chunks = parts * -(-work.rows // parts * work.response // train.loss_chunk)
    # Gradients are summed in float32: over micro-batches, and over chunks that of a trained head.
    gradient = 4 * (device_bytes(state.params) // jnp.dtype(settings.dtype).itemsize)
    head_gradient = 0 if settings.lora.rank else head("float32")
    weighs = settings.weight.reads_teacher
    # All-gathered as the student's is.
    ways = settings.mesh.fsdp
    teacher_head = device_bytes(said.head) * ways if said else 0
    return {
        "inputs of layers": (sizes.num_layers * inputs, 2 * parts),
        "gradient": (gradient, 2 * parts),
        # Read for logits and for the gradient of hidden states.
        "student's head": (head(settings.compute_dtype), 2 * chunks),
        "gradient of the head": (head_gradient, 2 * chunks),
        # Read for logits, and before for weights.
        "teacher's head": (teacher_head, (1 + weighs) * chunks),
    }


def _batch(settings: Settings, place: Placement, work: Workload) -> Batch:
    others = [name for name in settings.weight.labels if name != "verdict"]
    return Batch(
        tokens=place.rows(work.rows, work.sequence),
        turn_id=place.rows(work.rows, work.sequence),
        sampled_logprobs=place.rows(work.rows, work.sequence, dtype=jnp.float32),
        verdict=place.rows(work.rows, work.turns),
        response=place.rows(work.rows, work.response),
        labels={n: place.rows(work.rows, work.turns, dtype=jnp.float32) for n in others},
        actor=place.rows(work.rows, work.turns) if settings.learns_teacher_turns else None,
    )
