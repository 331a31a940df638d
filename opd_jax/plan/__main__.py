"""Plan a run: whether it fits a slice, and what bounds it. No accelerator is needed.

    python -m opd_jax.plan --config=quickstart --topology=v5e:2x2 --config.mesh.data=4
    python -m opd_jax.plan --config=alfworld_qwen3 --topology=v5e --smallest
    python -m opd_jax.plan --config=alfworld_qwen3 --topology=h100:8 --search --compile=false

--topology is a slice of v5e, v5p or v6e, or GPUs as in h100:8 (a100, h100, h200), which are counted
only; `local` compiles for the devices of this machine, with the config's mesh as it is. --smallest
tries the slices of the topology's family, from the smallest on, until the run fits. --search tries
every mesh of the slice by counting, and ranks them. --verbose prints every table and --json
everything as one object. --compile=false leaves out the compiler, which takes minutes; --limit_s is
how long it may take for one program. --cache is the directory of its remembered results, by default
in the user's cache directory.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from opd_jax import config as cfg
from opd_jax.plan import chips, screen
from opd_jax.plan.compiling import DEFAULT_CACHE, compile_programs, has_compiler
from opd_jax.plan.program import Run
from opd_jax.plan.programs import plan_run
from opd_jax.plan.report import describe
from opd_jax.plan.search import search
from opd_jax.plan.smallest import smallest
from opd_jax.plan.verdict import MISFIT, verdict
from opd_jax.report.tables import table
from opd_jax.runtime.exits import reported
from opd_jax.runtime.files import local_path
from opd_jax.runtime.mesh import MeshShape


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.plan`."""
    with reported():
        config, _, flags = cfg.parse_command_line(
            argv,
            usage=__doc__,
            needs_workdir=False,
            topology=str,
            smallest=False,
            search=False,
            json=False,
            verbose=False,
            compile=True,
            limit_s=600.0,
            cache="",
        )
        _run(config, cfg.given_fields(argv), flags)


def _run(config: Any, given: Sequence[str], flags: dict[str, Any]) -> None:
    topology, family = flags["topology"], flags["topology"].partition(":")[0]
    if topology == chips.LOCAL:
        # The compiler needs some memory of the device too.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    else:
        jax.config.update("jax_platforms", "cpu")  # leaves this machine's accelerators alone

    def fit(where: chips.Slice) -> Run:
        return plan_run(config, where, given=given)

    def plan(run: Run) -> dict[str, Any]:
        if not flags["compile"] or not has_compiler(run.where):
            return describe(run, None)
        results = {}
        cache = local_path(flags["cache"] or DEFAULT_CACHE, name="--cache")
        for program, result in compile_programs(run, cache=cache, limit_s=flags["limit_s"]):
            results[program.name] = result
            if flags["smallest"] and verdict(run, program, result) == MISFIT:
                break
        return describe(run, results)

    devices = MeshShape(**config.mesh).devices
    if flags["search"]:
        where = chips.find(topology, local_chips=devices)
        found = search(config, where, fit=lambda tried: plan_run(tried, where, given=given))
        print(json.dumps(found, indent=1) if flags["json"] else table(found, list(found[0])))
        return
    rows: list[dict[str, str]] = []
    result: dict[str, Any] | None
    if flags["smallest"]:
        rows, result = smallest(family, fit=fit, plan=plan)
    else:
        result = plan(fit(chips.find(topology, local_chips=devices)))
    if flags["json"]:
        print(json.dumps({"tried": rows, "plan": result}, indent=1))
        return
    if rows:
        print(table(rows, list(rows[0])), end="\n\n")
    if result is None:
        raise ValueError(f"`--smallest`: the run fits no slice of {family}")
    print(screen.text(result, verbose=flags["verbose"]))


if __name__ == "__main__":
    main(sys.argv[1:])
