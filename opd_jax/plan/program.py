"""A run on a slice: its programs, before they are compiled, and what it keeps in memory."""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh
from ml_collections import FrozenConfigDict

from opd_jax.plan.chips import Slice
from opd_jax.plan.jaxpr_flops import count_flops
from opd_jax.plan.models import PlannedModel
from opd_jax.plan.network import Sent
from opd_jax.plan.placement import device_bytes
from opd_jax.plan.workload import Workload
from opd_jax.runtime.mesh import AnyMesh

# What stays on the devices between programs. Frozen weights are the student's own beside adapters;
# the copy is only there during rollouts; the update takes the teacher's head and not its body.
Resident = Literal[
    "parameters",
    "optimizer",
    "frozen weights",
    "teacher's body",
    "teacher's head",
    "copy to sample with",
]

# The vector memory of v5e and v6e, the largest of any chip in `chips`.
ON_CHIP = 128 * 2**20


def passes(size: int, times: int) -> int:
    """Bytes that `times` passes over an array of `size` bytes move, at least.

    What fits on the chip may be read once and kept.
    """
    return size * (times if size > ON_CHIP else min(times, 1))


@dataclass(frozen=True)
class Program:
    """One compiled program of a run."""

    name: str
    function: Any  # jitted
    args: tuple  # abstract
    # Bytes between a chip and its memory in one run, by array: all that no compiler can avoid.
    # Activations that may stay on the chip are left out, and so is what other devices send.
    moved: dict[str, int]
    beside: tuple[Resident, ...]  # the residents that are not among its arguments
    runs: float  # in one update; 0 for programs of evaluations
    static: dict[str, Any] = field(default_factory=dict)  # keyword arguments
    trips: tuple[float, ...] = ()  # of its `while` loops, each inside the one before
    sent: Sent = field(default_factory=Sent)
    temporaries: int = 0  # bytes on each device that it needs beyond its arguments, at least


@dataclass(frozen=True)
class Run:
    """All programs of a run on a slice. Sizes are bytes on one device."""

    where: Slice
    config: FrozenConfigDict  # fitted to the slice
    changes: list[str]  # what was changed for that, in words
    student: PlannedModel
    teacher: PlannedModel | None
    work: Workload
    mesh: AnyMesh
    residents: dict[Resident, int]
    programs: tuple[Program, ...]  # in the order of an update, then those of evaluations
    # FLOPs on all devices of programs that were traced, by `_computation`. Runs may share it: the
    # mesh changes who computes what, and not how much.
    counted: dict[Any, float] = field(default_factory=dict)

    def beside(self, program: Program) -> int:
        """Bytes in use while `program` runs that are not its own."""
        return sum(self.residents[name] for name in program.beside)

    def least(self, program: Program) -> int:
        """Bytes in use while `program` runs, whatever the compiler does."""
        return device_bytes(program.args) + self.beside(program) + program.temporaries

    def flops(self, program: Program) -> float:
        """FLOPs of one device in one run of a program."""
        what = self._computation(program)
        if what not in self.counted:
            jaxpr = self.trace(program).jaxpr
            self.counted[what] = count_flops(jaxpr, while_trips=program.trips)
        return self.counted[what] / self.where.chips

    def _computation(self, program: Program) -> Any:
        """What a program computes, wherever: equal ones have equal FLOPs, on all devices."""
        leaves, tree = jax.tree.flatten(program.args)
        shapes = tuple((x.shape, x.dtype) for x in leaves)
        static = tuple((k, v) for k, v in program.static.items() if k != "sharded")
        parts = self.config.train.micro_batches
        return program.name, tree, shapes, static, program.trips, parts

    def trace(self, program: Program) -> Any:
        """A program traced with the mesh set as a run sets it."""
        is_abstract = isinstance(self.mesh, AbstractMesh)
        use: Any = jax.sharding.use_abstract_mesh if is_abstract else jax.set_mesh
        with use(self.mesh):
            return program.function.trace(*program.args, **program.static)
