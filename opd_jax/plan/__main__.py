"""Plan a run: whether it fits a slice, and what bounds it. No accelerator is needed.

    python -m opd_jax.plan --config=configs/NAME.py[:arg] --topology=v5e:4x4 [--config.x.y=v]

--topology is a slice of v5e, v5p or v6e; `local` compiles for the devices of this machine, with the
config's mesh as it stands. --smallest looks through the slices of the topology's family, from the
smallest on, for one that the run fits. --json prints everything as one object. --compile=false
leaves out the compiler, which takes minutes; --limit_s is how long it may take for one program, and
--cache the directory that its answers are kept in, by default the user's cache directory.
"""

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from opd_jax import config as cfg
from opd_jax.config.flags import flag_pairs
from opd_jax.plan import chips, compiling, report, smallest, tables
from opd_jax.plan.analysis import Analysis, analyze
from opd_jax.plan.verdict import MISFIT
from opd_jax.report.tables import table

_SWITCHES = ("json", "smallest", "compile")


class _Planner:
    """One command: a config, and how it is planned."""

    def __init__(self, config: FrozenConfigDict, words: Sequence[str], flags: dict[str, Any]):
        self._config, self._words = config, words
        self._given = cfg.given_fields(words)
        self._cache = Path(flags["cache"]) if flags["cache"] else compiling.default_cache()
        self._compile, self._limit_s = flags["compile"], flags["limit_s"]

    def plan(self, where: chips.Slice, *, until_misfit: bool = False) -> dict[str, Any]:
        """The report of a slice; compiled up to the first misfit, or whole."""
        analysis = analyze(self._config, where, given=self._given)
        compiled = None
        if self._compile and compiling.has_compiler(where):
            compiled = self._compiled(analysis, until_misfit=until_misfit)
        return report.describe(analysis, compiled)

    def _compiled(self, analysis: Analysis, *, until_misfit: bool) -> dict[str, dict[str, Any]]:
        results: dict[str, dict[str, Any]] = {}
        # What is most likely not to fit comes first.
        costs = sorted(analysis.costs, key=lambda cost: -cost.least)
        for number, cost in enumerate(costs, start=1):
            name = cost.program.name
            print(f"compiling {number} of {len(costs)}: {name}", file=sys.stderr, flush=True)
            results[name] = compiling.compile_program(
                analysis, cost.program, self._words, cache=self._cache, limit_s=self._limit_s
            )
            so_far = report.describe(analysis, results)
            if until_misfit and so_far["verdict"] == MISFIT:
                break
        return results

    def smallest(self, family: str) -> tuple[list[dict[str, str]], dict[str, Any] | None]:
        """What was tried, and the report of the slice that it ended with."""
        compiles = self._compile and compiling.has_compiler(chips.slices(family)[0])
        attempts = list(
            smallest.tried(
                self._config,
                family,
                given=self._given,
                plan=lambda where: self.plan(where, until_misfit=True),
                compiles=compiles,
            )
        )
        rows = [
            {"slice": where.name, "verdict": verdict, "why": why}
            for where, verdict, why in attempts
        ]
        where, verdict, _ = attempts[-1]
        return rows, None if verdict == MISFIT else self.plan(where)


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.plan`."""
    try:
        config, _, flags = cfg.parse_command_line(
            argv,
            usage=__doc__,
            needs_workdir=False,
            topology=str,
            json=False,
            smallest=False,
            compile=True,
            cache="",
            limit_s=600.0,
        )
        _run(config, argv, flags)
    except ValueError as error:
        cfg.fail(error)


def _run(config: FrozenConfigDict, argv: Sequence[str], flags: dict[str, Any]) -> None:
    topology = flags["topology"]
    if topology == chips.LOCAL:
        # What compiles needs some memory of the device too.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    else:
        jax.config.update("jax_platforms", "cpu")  # not a device of this machine is touched
    pairs = flag_pairs(argv, switches=_SWITCHES)
    words = [f"--{name}={text}" for name, text in pairs if name.partition(".")[0] == "config"]
    planner = _Planner(config, words, flags)
    rows: list[dict[str, str]] = []
    if flags["smallest"]:
        rows, result = planner.smallest(topology.partition(":")[0])
    else:
        where = chips.find(topology, local_chips=math.prod(config.mesh.values()))
        result = planner.plan(where)
    if flags["json"]:
        print(json.dumps({"config": words[0], "tried": rows, "plan": result}, indent=1))
        return
    if rows:
        print(table(rows, list(rows[0])), end="\n\n")
    if result is None:
        raise ValueError(f"`--smallest`: the run fits no slice of {topology.partition(':')[0]}")
    print(
        tables.text(
            result,
            can_compile=compiling.has_compiler(chips.find(result["topology"], local_chips=1)),
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
