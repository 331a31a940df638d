"""The programs of a run, with abstract arguments placed as the run places them.

They are the very functions that training, rollout, judge and evaluation call, at the largest shapes
of the `Workload`.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from opd_jax.config import build
from opd_jax.config.settings import Settings, read_settings
from opd_jax.learner import train_state
from opd_jax.model import ModelConfig, head_params
from opd_jax.model.lora import lora_specs, with_adapters
from opd_jax.plan.chips import Slice
from opd_jax.plan.judging import judging
from opd_jax.plan.models import planned_pair
from opd_jax.plan.placement import Placement, device_bytes, for_decoding
from opd_jax.plan.program import Program, Resident, Run
from opd_jax.plan.sampling import Player, copying, evaluation, rollout
from opd_jax.plan.training import training
from opd_jax.plan.workload import fit_to_slice, workload
from opd_jax.runtime.mesh import DECODING, abstract_mesh, gathered, make_mesh


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
    settings = read_settings(config)
    sizes = settings.mesh.axes
    mesh = make_mesh(**sizes, devices=devices) if devices else abstract_mesh(**sizes)
    place, work = Placement(mesh, where.chip.platform), workload(settings)
    student, teacher = planned_pair(settings, platform=where.chip.platform)
    lora = build.adapters(settings)
    loaded = place.params(student.sizes, student.dtype)
    trained = place.arrays(lora_specs(student.sizes, lora), settings.dtype) if lora else loaded
    state = train_state.abstract_state(trained, build.optimizer(settings))
    base = loaded if lora else None
    frozen = teacher and place.params(teacher.sizes, teacher.dtype, rules=DECODING)
    head = device_bytes(head_params(frozen)) if frozen else 0
    copy = _copy(settings, student.sizes, place)
    residents: dict[Resident, int] = {
        "parameters": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "frozen weights": device_bytes(base),
        "teacher's body": device_bytes(frozen) - head,
        "teacher's head": head,
        "copy to sample with": device_bytes(copy),
    }
    own: tuple[Resident, ...] = ("parameters", "optimizer", "frozen weights")
    others: tuple[Resident, ...] = ("teacher's body", "teacher's head")
    sampler = Player(place, student.sizes, copy, own + others)
    expert = Player(place, teacher.sizes, frozen, own) if teacher else None
    # When the teacher plays, it has a copy to sample with too.
    playing = None
    if teacher:
        copied = for_decoding(frozen, platform=place.platform)
        playing = Player(place, teacher.sizes, copied, own + others)

    def programs() -> Iterator[Program]:
        source = settings.data.source
        # `read_settings` asks for a teacher wherever one is needed.
        if settings.data.on_policy:
            params = with_adapters(base, state.params, lora)
            yield copying(settings, params, sampler, ("optimizer", *others))
            yield from rollout(settings, sampler, work)
        elif source == "teacher" and playing:
            yield from rollout(settings, playing, work)
        if settings.weight.reads_verdict and teacher and expert:
            yield from judging(settings, expert, work, label_width=teacher.label_width)
        scorer = expert if settings.objective.needs_teacher else None
        compiled = build.compile_update(
            settings,
            student=student.sizes,
            teacher=scorer.sizes if scorer else None,
            placement=train_state.placement_of(state),
        )
        yield from training(settings, *compiled, state, base, sampler, scorer, work)
        # A student of the same batch is evaluated with the programs of its updates.
        if not settings.data.on_policy or settings.eval.batch != settings.rollout.at_once:
            yield from evaluation(settings, "student", sampler, work)
        if "teacher" in settings.eval.who and playing:
            yield from evaluation(settings, "teacher", playing, work)

    return Run(where, config, changes, student, teacher, work, mesh, residents, tuple(programs()))


def _copy(settings: Settings, sizes: ModelConfig, place: Placement) -> Any:
    """What the student samples with, as `generate.sampling_params` returns it."""
    lora, floats = build.adapters(settings), settings.compute_dtype
    rules = gathered(DECODING) if settings.rollout.gather_weights else DECODING
    kept = "int8" if settings.lora.int8 else floats
    own = place.params(sizes, kept, rules=rules, floats=floats)
    if lora is None:
        return for_decoding(own, platform=place.platform)
    adapters = place.arrays(lora_specs(sizes, lora), floats, rules=rules)
    return for_decoding(with_adapters(own, adapters, lora), platform=place.platform)
