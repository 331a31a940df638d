"""The programs of a run, with abstract arguments placed as the run places them.

They are the very functions that training, rollout, judge and evaluation call, at the largest shapes
of the `Workload`.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from opd_jax.config import build as experiment
from opd_jax.learner import train_state, train_step
from opd_jax.model import ModelConfig, cache_layout
from opd_jax.model.lora import lora_specs, with_adapters
from opd_jax.plan.chips import Slice
from opd_jax.plan.judging import judging
from opd_jax.plan.models import planned_pair
from opd_jax.plan.placement import Placement, device_bytes
from opd_jax.plan.program import COPY, FROZEN, OPTIMIZER, PARAMETERS, TEACHER, Program, Run
from opd_jax.plan.sampling import Player, copying, evaluation, rollout
from opd_jax.plan.training import training
from opd_jax.plan.workload import fit_to_slice, mesh_sizes, workload
from opd_jax.runtime.mesh import abstract_mesh, make_mesh


def plan_run(
    config: FrozenConfigDict,
    where: Slice,
    *,
    given: Collection[str] = (),
    devices: Sequence[jax.Device] | None = None,
) -> Run:
    """A run of `config` on a slice.

    Args:
      given: fields that were set on the command line and may not be changed for the slice.
      devices: of the mesh, if programs are to be compiled; without them it is abstract.

    Raises:
      ValueError: the config is not valid, or something does not divide over the slice.
    """
    config, changes = fit_to_slice(config, chips=where.chips, given=given)
    sizes = mesh_sizes(config)
    mesh = make_mesh(**sizes, devices=devices) if devices else abstract_mesh(**sizes)
    place, work = Placement(mesh, cache_layout(where.chip.platform)), workload(config)
    student, teacher = planned_pair(config)
    lora = experiment.make_lora(config.lora)
    loaded = place.params(student.sizes, student.dtype)
    trained = place.arrays(lora_specs(student.sizes, lora), config.dtype) if lora else loaded
    state = train_state.abstract_state(trained, experiment.make_optimizer(config))
    base = loaded if lora else None
    frozen = teacher and place.params(teacher.sizes, teacher.dtype)
    copy = _copy(config, student.sizes, place)
    residents = {
        PARAMETERS: device_bytes(state.params),
        OPTIMIZER: device_bytes(state.opt_state),
        FROZEN: device_bytes(base),
        TEACHER: device_bytes(frozen),
        COPY: device_bytes(copy),
    }
    own = (PARAMETERS, OPTIMIZER, FROZEN)
    sampler = Player(place, student.sizes, copy, (*own, TEACHER))
    expert = Player(place, teacher.sizes, frozen, own) if teacher else None

    def programs() -> Iterator[Program]:
        source = config.data.source
        # `validate` asks for a teacher wherever one is needed.
        if source == "on_policy":
            params = with_adapters(base, state.params, lora)
            yield copying(config, params, sampler, (OPTIMIZER, TEACHER))
            yield from rollout(config, sampler, work)
        elif source == "teacher" and expert:
            yield from rollout(config, expert, work)
        if config.objective.intervention and teacher and expert:
            yield from judging(config, expert, work, label_width=teacher.label_width)
        scorer = expert if config.objective.divergence != "cross_entropy" else None
        step = _train_step(config, state, student.sizes, scorer.sizes if scorer else None)
        yield training(config, step, state, base, student.sizes, scorer, place, work)
        # A student of the same batch is evaluated with the programs of its updates.
        if source != "on_policy" or config.eval.batch != config.rollout.batch:
            yield from evaluation(config, "student", sampler, work)
        if "teacher" in config.eval.who and expert:
            yield from evaluation(config, "teacher", expert, work)

    return Run(where, config, changes, student, teacher, work, mesh, residents, tuple(programs()))


def _copy(config: FrozenConfigDict, sizes: ModelConfig, place: Placement) -> Any:
    """What the student samples with, as `generate.sampling_params` returns it."""
    lora, floats = experiment.make_lora(config.lora), config.compute_dtype
    gathered = config.rollout.gather_weights
    kept = "int8" if config.lora.int8 else floats
    own = place.params(sizes, kept, gathered=gathered, floats=floats)
    if lora is None:
        return own
    adapters = place.arrays(lora_specs(sizes, lora), floats, gathered=gathered)
    return with_adapters(own, adapters, lora)


def _train_step(
    config: FrozenConfigDict, state: Any, student: ModelConfig, teacher: ModelConfig | None
) -> Any:
    train = config.train
    return train_step.make_train_step(
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
