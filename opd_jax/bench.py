"""Times the programs of an update of any config, with random weights, on the hardware at hand.

    python -m opd_jax.bench --config=quickstart
    python -m opd_jax.bench --config=quickstart --config.rollout.batch=64 --runs=10 --json

The models need not be here: their sizes are known or read. No environment plays and no text is
read: the programs run at the shapes that `opd_jax.plan` gives them, and their times are set beside
its bounds. `share` is the bound over the time, `MFU` the FLOP/s of the matrix products over the
chip's peak, `GB/s` what has to be moved over the time. A chip whose peaks are not known has only
times. `--runs` is how often each program is timed; the median counts.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from opd_jax.config import parse_command_line
from opd_jax.plan.arguments import Arguments
from opd_jax.plan.chips import LOCAL, find
from opd_jax.plan.program import Program, Run
from opd_jax.plan.programs import plan_run
from opd_jax.plan.report import describe
from opd_jax.report.tables import table
from opd_jax.runtime import compilation, processes
from opd_jax.runtime.exits import reported
from opd_jax.runtime.mesh import MeshShape


def bench(config: FrozenConfigDict, *, runs: int) -> dict[str, Any]:
    """What an update's programs take here: rows by program, and their sum.

    Raises:
      ValueError: the config is not valid, or does not divide over its mesh.
    """
    devices = MeshShape(**config.mesh).devices
    run = plan_run(config, find(LOCAL, local_chips=devices), devices=jax.devices()[:devices])
    bounds = {row["name"]: row for row in describe(run, None)["programs"]}
    rows = [
        _row(run, program, bounds[program.name], runs=runs)
        for program in run.programs
        if program.runs
    ]
    seconds = sum(row["seconds of an update"] for row in rows)
    sampled = run.work.rows * run.work.sampled
    playing = ("copy to sample with", "first message", "observation", "sampling")
    rollout = sum(r["seconds of an update"] for r in rows if r["program"] in playing)
    return {
        "chip": dataclasses.asdict(run.where.chip),
        "mesh": config.mesh.to_dict(),
        "jax": jax.__version__,
        "programs": rows,
        "seconds of an update": seconds,
        "sampled tokens per second of rollout": sampled / rollout if rollout else None,
    }


def _row(run: Run, program: Program, bound: dict[str, Any], *, runs: int) -> dict[str, Any]:
    processes.say(f"running {program.name}")
    mesh: Any = run.mesh  # of devices, as made here
    with jax.set_mesh(mesh):
        arguments = Arguments(program)
        start = time.perf_counter()
        arguments.run()
        first, times = time.perf_counter() - start, []
        for _ in range(runs):
            start = time.perf_counter()
            arguments.run()
            times.append(time.perf_counter() - start)
    seconds, chip = statistics.median(times), run.where.chip
    row = {
        "program": program.name,
        "runs": program.runs,
        "compile and first run, s": first,
        "ms": 1e3 * seconds,
        "seconds of an update": program.runs * seconds,
        "GB/s": sum(program.moved.values()) / seconds / 1e9,
    }
    if chip.flops and chip.bandwidth:
        row |= {
            "share": bound["seconds"] / seconds,
            "MFU": bound["flops"] / seconds / chip.flops,
        }
    return row


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.bench`."""
    with reported():
        config, _, flags = parse_command_line(
            argv, usage=__doc__, needs_workdir=False, runs=5, json=False
        )
        processes.open_devices()
        compilation.start("")
        result = bench(config, runs=flags["runs"])
    if flags["json"]:
        print(json.dumps(result, indent=1))
        return
    print(table(result["programs"], list(result["programs"][0])))
    print(f"\nAn update takes {result['seconds of an update']:.3g} s of these programs.")


if __name__ == "__main__":
    main(sys.argv[1:])
