"""What can be said of a run on a slice without compiling anything."""

from collections.abc import Collection
from dataclasses import dataclass

from ml_collections import FrozenConfigDict

from opd_jax.model import cache_layout
from opd_jax.plan.bounds import Bound, bound
from opd_jax.plan.chips import Slice
from opd_jax.plan.jaxpr_flops import count_flops
from opd_jax.plan.models import PlannedModel, planned_pair
from opd_jax.plan.program import Program, Run
from opd_jax.plan.programs import plan_run
from opd_jax.plan.traffic import device_bytes
from opd_jax.plan.verdict import analytic_verdict
from opd_jax.plan.workload import lay_over
from opd_jax.runtime.mesh import abstract_mesh


@dataclass(frozen=True)
class Cost:
    """What one program costs each device at least.

    Attributes:
      program: which.
      arguments: bytes.
      beside: bytes of other arrays on the device.
      least: bytes in all, whatever the compiler does.
      verdict: see `verdict.analytic_verdict`.
      flops: of one run; None for programs outside of updates.
      moved: bytes of one run.
      bound: of one run; None where `flops` is.
    """

    program: Program
    arguments: int
    beside: int
    least: int
    verdict: str
    flops: float | None
    moved: int
    bound: Bound | None


@dataclass(frozen=True)
class Analysis:
    """A run laid over a slice.

    Attributes:
      slice: which.
      config: as it would run.
      changes: what was changed for the slice, in words.
      student: its sizes.
      teacher: its sizes, or None.
      run: the programs.
      costs: of each of them.
    """

    slice: Slice
    config: FrozenConfigDict
    changes: list[str]
    student: PlannedModel
    teacher: PlannedModel | None
    run: Run
    costs: list[Cost]

    def update_seconds(self) -> float | None:
        """The least time of one update: its programs run one after another."""
        parts = [
            cost.program.runs * cost.bound.seconds
            for cost in self.costs
            if cost.bound is not None and cost.bound.seconds is not None
        ]
        return sum(parts) if parts else None


def analyze(
    config: FrozenConfigDict, where: Slice, *, given: Collection[str], flops: bool = True
) -> Analysis:
    """Lays a run over a slice and counts.

    Args:
      given: fields set on the command line.
      flops: also count these, which takes a few seconds.

    Raises:
      ValueError: the config is not valid, or something does not divide over the slice.
    """
    config, changes = lay_over(config, chips=where.chips, given=given)
    student, teacher = planned_pair(config)
    run = plan_run(
        config,
        student,
        teacher,
        mesh=abstract_mesh(**config.mesh),
        layout=cache_layout(where.chip.platform),
    )
    costs = [_cost(run, program, where, flops=flops) for program in run.programs]
    return Analysis(where, config, changes, student, teacher, run, costs)


def _cost(run: Run, program: Program, where: Slice, *, flops: bool) -> Cost:
    arguments, beside = device_bytes(program.args), run.beside(program)
    least = arguments + beside + program.temporaries
    moved = sum(part.total for part in program.moved)
    counted, shortest = None, None
    if flops and program.runs:
        whole = count_flops(run.trace(program).jaxpr, while_trips=program.trips)
        counted = whole / where.chips
        shortest = bound(where.chip, flops=counted, moved=moved)
    verdict = analytic_verdict(least, limit=where.chip.memory)
    return Cost(program, arguments, beside, least, verdict, counted, moved, shortest)
