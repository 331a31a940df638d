"""The meshes of a slice, ranked by what bounds an update."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from opd_jax.plan.chips import GIB, Slice
from opd_jax.plan.program import Run
from opd_jax.plan.report import describe
from opd_jax.plan.verdict import MISFIT


def search(
    config: FrozenConfigDict, where: Slice, *, fit: Callable[[FrozenConfigDict], Run]
) -> list[dict[str, Any]]:
    """A row for each mesh of the slice on which the run is possible, the fastest first.

    Nothing is compiled, and a program that several meshes run is traced once. Meshes that certainly
    do not fit come last.

    Args:
      fit: the run with a config; raises ValueError if something does not divide.
    """
    counted: dict[Any, float] = {}
    rows = []
    for mesh in _meshes(where.chips):
        changed = ConfigDict(config.to_dict())
        changed.mesh.update(mesh)
        try:
            run = fit(FrozenConfigDict(changed))
        except ValueError:
            continue
        report = describe(replace(run, counted=counted), None)
        seconds, waiting = report["update_seconds"] or 0.0, report["waiting_seconds"]
        rows.append(
            mesh
            | {
                "micro_batches": run.config.train.micro_batches,
                "seconds, at least": seconds + waiting,
                "of them waiting": waiting,
                "GiB, at least": max(map(run.least, run.programs)) / GIB,
                "verdict": report["verdict"],
            }
        )
    return sorted(rows, key=lambda row: (row["verdict"] == MISFIT, row["seconds, at least"]))


def _meshes(chips: int) -> list[dict[str, int]]:
    """All sizes of `config.mesh` that take a number of chips."""
    divisors = [size for size in range(1, chips + 1) if chips % size == 0]
    return [
        {"data": data, "fsdp": fsdp, "decode": decode, "tensor": tensor}
        for data, fsdp, decode, tensor in product(divisors, repeat=4)
        if data * fsdp * tensor == chips and fsdp % decode == 0
    ]
