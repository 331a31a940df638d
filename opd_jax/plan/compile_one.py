"""Compiles one program of a run for a slice and writes down what came out, as JSON.

    python -m opd_jax.plan.compile_one --config=FILE --topology=v5e:4x4 --program=NAME --out=FILE

A process of its own, so that a compiler that hangs or dies takes nothing else with it.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from opd_jax.config import fail, given_fields, parse_command_line
from opd_jax.model import cache_layout
from opd_jax.plan import chips
from opd_jax.plan.collectives import collectives, copies
from opd_jax.plan.hlo import parse
from opd_jax.plan.models import planned_pair
from opd_jax.plan.programs import plan_run
from opd_jax.plan.verdict import Memory
from opd_jax.plan.workload import lay_over
from opd_jax.runtime.mesh import make_mesh


def compile_one(
    config: FrozenConfigDict, where: chips.Slice, name: str, *, given: Sequence[str]
) -> dict[str, Any]:
    """Memory, collectives and copies of a compiled program, or why it was refused."""
    config, _ = lay_over(config, chips=where.chips, given=given)
    start = time.perf_counter()
    try:
        mesh = make_mesh(**config.mesh, devices=_devices(where))
        layout = cache_layout(where.chip.platform)
        run = plan_run(config, *planned_pair(config), mesh=mesh, layout=layout)
        program = next(program for program in run.programs if program.name == name)
        compiled = run.compile(program)
    # A mesh that the slice has no wires for is a NotImplementedError.
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return {"refused": " ".join(str(error).split())}
    stats = compiled.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
    )
    module = parse(compiled.as_text())
    return {
        "refused": None,
        "seconds": round(time.perf_counter() - start, 1),
        "memory": dataclasses.asdict(memory),
        "collectives": [dataclasses.asdict(part) for part in collectives(module)],
        "copies": [dataclasses.asdict(part) for part in copies(module)],
    }


def _devices(where: chips.Slice) -> Sequence[jax.Device]:
    """The devices of a slice: those that are here, or descriptions of a TPU's."""
    if where.name == chips.LOCAL:
        return jax.devices()
    from jax.experimental import topologies

    # A host with fewer chips than usual has to be described.
    bounds = {"chips_per_host_bounds": [1, 1, 1]} if where.chips == 1 else {}
    return topologies.get_topology_desc(where.name, platform="tpu", **bounds).devices


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.plan.compile_one`."""
    try:
        config, _, flags = parse_command_line(
            argv, usage=__doc__, needs_workdir=False, topology=str, program=str, out=str
        )
        # It would write what was compiled for another platform, and fail to read it again.
        jax.config.update("jax_enable_compilation_cache", False)
        where = chips.find(flags["topology"], local_chips=math.prod(config.mesh.values()))
        result = compile_one(config, where, flags["program"], given=given_fields(argv))
        Path(flags["out"]).write_text(json.dumps(result), encoding="utf-8")
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
