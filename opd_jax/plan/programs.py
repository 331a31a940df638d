"""The programs that a run compiles, with abstract arguments placed as the run places them.

They are the very functions that training, rollout, judge and evaluation call, at the largest shapes
of the `Workload`. Nothing here needs a device: a mesh may be abstract.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import FrozenConfigDict

from opd_jax.config import build as experiment
from opd_jax.learner import train_state
from opd_jax.model import ModelConfig
from opd_jax.model.lora import lora_specs, with_adapters
from opd_jax.plan.judging import judging
from opd_jax.plan.models import PlannedModel
from opd_jax.plan.placement import Placement
from opd_jax.plan.program import (
    COPY,
    FROZEN,
    OPTIMIZER,
    PARAMETERS,
    TEACHER,
    Program,
    Run,
)
from opd_jax.plan.sampling import Player, copying, evaluation, rollout
from opd_jax.plan.traffic import device_bytes
from opd_jax.plan.training import training
from opd_jax.plan.workload import Workload, workload
from opd_jax.runtime.mesh import AnyMesh


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
    place, work = Placement(mesh, layout), workload(config)
    lora = experiment.make_lora(config.lora)
    loaded = place.params(student.sizes, experiment.student_dtype(config))
    specs = lora and lora_specs(student.sizes, lora)
    trained = place.arrays(specs, config.dtype) if lora else loaded
    state = train_state.abstract_state(trained, experiment.make_optimizer(config))
    frozen = teacher and place.params(teacher.sizes, config.teacher_dtype)
    copy = _copy(config, student.sizes, place)
    residents = {
        PARAMETERS: device_bytes(state.params),
        OPTIMIZER: device_bytes(state.opt_state),
        FROZEN: device_bytes(loaded) if lora else 0,
        TEACHER: device_bytes(frozen),
        COPY: device_bytes(copy),
    }
    sampling = Player(student.sizes, copy, (PARAMETERS, OPTIMIZER, FROZEN, TEACHER))
    base = loaded if lora else None
    programs = _programs(config, student, teacher, state, base, sampling, frozen, place, work)
    return Run(tuple(programs), residents, work, mesh)


def _copy(config: FrozenConfigDict, sizes: ModelConfig, place: Placement) -> Any:
    """What the student samples with, as from `generate.sampling_params`."""
    lora, floats = experiment.make_lora(config.lora), config.compute_dtype
    gathered = config.rollout.gather_weights
    kept = "int8" if config.lora.int8 else floats
    own = place.params(sizes, kept, gathered=gathered, floats=floats)
    if lora is None:
        return own
    adapters = place.arrays(lora_specs(sizes, lora), floats, gathered=gathered)
    return with_adapters(own, adapters, lora)


def _programs(
    config: FrozenConfigDict,
    student: PlannedModel,
    teacher: PlannedModel | None,
    state: Any,
    base: Any,
    sampling: Player,
    frozen: Any,
    place: Placement,
    work: Workload,
) -> Iterator[Program]:
    source, others = config.data.source, (PARAMETERS, OPTIMIZER, FROZEN)
    # `config.validate` asks for a teacher wherever one is needed.
    if source == "on_policy":
        params = with_adapters(base, state.params, experiment.make_lora(config.lora))
        yield copying(config, params, sampling, beside=(OPTIMIZER, TEACHER))
        yield from rollout(config, sampling, place, work)
    elif source == "teacher" and teacher:
        yield from rollout(config, Player(teacher.sizes, frozen, others), place, work)
    if config.objective.intervention and teacher:
        judge = Player(teacher.sizes, frozen, others)
        yield from judging(config, judge, place, work, label_width=teacher.label_width)
    scores = config.objective.divergence != "cross_entropy"
    scorer = teacher.sizes if teacher and scores else None
    yield training(config, state, base, student.sizes, scorer, place, work)
    if source != "on_policy" or config.eval.batch != config.rollout.batch:
        # Else as in an update, but for the temperature.
        yield from evaluation(config, "student", sampling, place, work)
    if "teacher" in config.eval.who and teacher:
        yield from evaluation(config, "teacher", Player(teacher.sizes, frozen, others), place, work)
