"""The train step as a program: its arguments, and what it must hold and move."""

from typing import Any

import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from opd_jax.learner.batch import Batch
from opd_jax.model import ModelConfig
from opd_jax.plan.placement import Placement, device_bytes
from opd_jax.plan.program import TEACHER, Program, passes
from opd_jax.plan.sampling import Player
from opd_jax.plan.workload import Workload


def training(
    config: FrozenConfigDict,
    step: Any,
    state: Any,
    base: Any,
    student: ModelConfig,
    teacher: Player | None,
    place: Placement,
    work: Workload,
) -> Program:
    """The update's program.

    Args:
      step: from `make_train_step`.
      state: abstract, from `abstract_state`.
      base: abstract, the student's own parameters if the state's are adapters; else None.
      teacher: None if the objective has no teacher.
    """
    train, parts = config.train, config.train.micro_batches
    teacher_params = teacher and teacher.params

    def head(sizes: ModelConfig, dtype: str) -> int:
        """Bytes of a head that is replicated along `fsdp`."""
        # The embedding has the head's shape, and its axes in another order.
        return device_bytes(place.params(sizes, dtype, gathered=True)["embed"])

    shape = work.rows // parts, work.sequence, student.d_model
    inputs = student.num_layers * device_bytes(place.rows(*shape, dtype=config.compute_dtype))
    # Summed over micro-batches in float32; sharded as the parameters.
    gradient = 4 * (device_bytes(state.params) // jnp.dtype(config.dtype).itemsize)
    # Of a head that is trained, summed over chunks in float32.
    head_gradient = 0 if config.lora.rank else head(student, "float32")
    teacher_head = head(teacher.sizes, config.teacher_dtype) if teacher else 0
    chunks = parts * -(-work.rows // parts * work.response // train.loss_chunk)
    # What exists at once in the backward pass: bytes, and passes over them.
    held = {
        "inputs of layers": (inputs, 2 * parts),
        "gradient": (gradient, 2 * parts),
        # Read for logits, for logits again, and for the gradient of hidden states.
        "student's head": (head(student, config.compute_dtype), 3 * chunks),
        "gradient of the head": (head_gradient, 2 * chunks),
        "teacher's head": (teacher_head, 2 * chunks),
    }
    forward_and_backward = parts * (3 if train.remat == "layers" else 2)
    arrays = held | {
        "parameters": (device_bytes((state.params, base)), forward_and_backward),
        "teacher": (device_bytes(teacher_params), parts),
        "optimizer": (device_bytes((state.params, state.opt_state)), 2),
    }
    return Program(
        "train step",
        step,
        (state, teacher_params, _batch(place, work), base),
        {name: passes(*array) for name, array in arrays.items()},
        () if teacher else (TEACHER,),
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
