"""One compiled program of a run before it is compiled, and all of them together."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from opd_jax.plan.traffic import Moved
from opd_jax.plan.workload import Workload
from opd_jax.runtime.mesh import AnyMesh

# What stays on the devices as long as the run.
PARAMETERS, OPTIMIZER, TEACHER = "parameters", "optimizer", "teacher"
# The student's own weights where adapters are trained.
FROZEN = "frozen weights"
# What the student samples with, while it does.
COPY = "copy to sample with"


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
        """A program traced, for its jaxpr."""
        with _current(self.mesh):
            return program.function.trace(*program.args, **program.kwargs)

    def lower(self, program: Program, *, platform: str) -> Any:
        """A program lowered for a platform, which need not be here."""
        with _current(self.mesh):
            return self.trace(program).lower(lowering_platforms=(platform,))

    def compile(self, program: Program) -> Any:
        """A program compiled for the devices of the mesh, which is then not abstract."""
        with _current(self.mesh):
            return self.trace(program).lower().compile()


def _current(mesh: AnyMesh) -> AbstractContextManager:
    """As a run sets its mesh."""
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh)
