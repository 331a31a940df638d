"""A plan as one dictionary of plain values; sizes in bytes, times in seconds."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from opd_jax.model import is_spec, param_specs
from opd_jax.plan.chips import LATENCY_S
from opd_jax.plan.models import PlannedModel
from opd_jax.plan.placement import device_bytes
from opd_jax.plan.program import Program, Run
from opd_jax.plan.sampling import SAMPLING
from opd_jax.plan.verdict import verdict, worst

ASSUMED = (
    "every episode takes all its turns and fills its context; a question to the judge is as long "
    "as a first message and a response; FLOPs of attention are those of a full cache; not counted: "
    "the second decoding of `judge.agreement_every`, what `rollout.history_turns` adds"
)

TEACHERS_TURNS = (
    "the teacher's turns in the student's episodes: its cache of all rows, and its reading and "
    "sampling"
)


def describe(run: Run, compiled: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    """Everything that is known of a run on a slice.

    Times are bounds: FLOPs over the chip's peak and bytes moved over its bandwidth, whichever is
    longer. The programs of an update run one after another, so its bound is their sum.

    Args:
      compiled: by program, from `compiling`; None if nothing was compiled.
    """
    results, how = compiled or {}, run.config.rollout
    programs = [_program(run, program, results.get(program.name)) for program in run.programs]
    seconds = {p["name"]: p["runs"] * p["seconds"] for p in programs if p["seconds"] is not None}
    update = sum(seconds.values()) if seconds else None
    return {
        "verdict": worst(program["verdict"] for program in programs),
        "compiled": compiled is not None,
        "topology": run.where.name,
        "chips": run.where.chips,
        "chip": dataclasses.asdict(run.where.chip),
        "mesh": run.config.mesh.to_dict(),
        "changed": run.changes,
        "student": _model(run.student),
        "teacher": run.teacher and _model(run.teacher),
        "work": dataclasses.asdict(run.work),
        "assumed": ASSUMED,
        "not_counted": TEACHERS_TURNS if how.teacher_share or how.take_over_after else "",
        "residents": run.residents,
        "programs": programs,
        "update_seconds": update,
        "waiting_seconds": sum(p["runs"] * p["waiting"] for p in programs),
        "sampling_share": seconds.get(SAMPLING, 0.0) / update if update else None,
        "collectives": _collectives(run, results),
    }


def _model(model: PlannedModel) -> dict[str, Any]:
    specs = jax.tree.leaves(param_specs(model.sizes), is_leaf=is_spec)
    parameters = sum(math.prod(spec.shape) for spec in specs)
    return {"parameters": parameters, "dtype": model.dtype, "source": model.source}


def _program(run: Run, program: Program, result: Mapping[str, Any] | None) -> dict[str, Any]:
    chip, found, beside = run.where.chip, result or {}, run.beside(program)
    sent = program.sent
    flops = run.flops(program) if program.runs else None
    by_flops = flops / chip.flops if flops is not None and chip.flops else None
    by_bandwidth = sum(program.moved.values()) / chip.bandwidth if chip.bandwidth else None
    by_wires = sent.ahead / chip.wires if chip.wires else None
    known = [bound for bound in (by_flops, by_bandwidth, by_wires) if bound is not None]
    return {
        "name": program.name,
        "runs": program.runs,
        "arguments": device_bytes(program.args),
        "beside": beside,
        "least": run.least(program),
        **{name: found.get(name) for name in ("temporaries", "code", "peak")},
        "total": found["total"] + beside if "total" in found else None,
        "verdict": verdict(run, program, result),
        "refused": found.get("refused", ""),
        "flops": flops,
        "moved": program.moved,
        "sent": sent._asdict(),
        "waiting": sent.waits * LATENCY_S + (sent.awaited / chip.wires if chip.wires else 0.0),
        "by_flops": by_flops,
        "by_bandwidth": by_bandwidth,
        "by_wires": by_wires,
        "seconds": max(known, default=None) if program.runs else None,
    }


def _collectives(run: Run, results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for like collectives of one program; those that send most in an update come first.

    `bytes` is what a device sends in one run of the program, and `in_sequence` how many run in it,
    one after another; None if the trip count of a loop is not known.
    """
    rows = [
        {
            "program": program.name,
            "runs": program.runs,
            **part,
            "in_sequence": part["in_sequence"] if part["known"] else None,
        }
        for program in run.programs
        for part in results.get(program.name, {}).get("collectives", ())
    ]
    return sorted(rows, key=lambda row: -row["bytes"] * row["runs"])
