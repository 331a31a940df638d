"""A plan as one dictionary of plain values."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from opd_jax.config.build import student_dtype
from opd_jax.model import is_spec, param_specs
from opd_jax.plan.analysis import Analysis, Cost
from opd_jax.plan.models import PlannedModel
from opd_jax.plan.verdict import MISFIT, NOT_COMPILED, Memory, compiled_verdict, worst

# A collective of this many bytes is one of weights, or as large.
_WEIGHTY = 16 * 2**20

Compiled = Mapping[str, Mapping[str, Any]]


def describe(analysis: Analysis, compiled: Compiled | None) -> dict[str, Any]:
    """Everything that is known of a run on a slice; sizes in bytes, times in seconds.

    Args:
      compiled: by program what `compiling.compile_program` gave; None where nothing was compiled.
    """
    config = analysis.config
    programs = [
        _program(analysis, cost, (compiled or {}).get(cost.program.name)) for cost in analysis.costs
    ]
    return {
        "topology": analysis.slice.name,
        "chips": analysis.slice.chips,
        "hosts": analysis.slice.hosts,
        "chip": dataclasses.asdict(analysis.slice.chip),
        "mesh": config.mesh.to_dict(),
        "changed": analysis.changes,
        "student": _model(analysis.student, student_dtype(config)),
        "teacher": analysis.teacher and _model(analysis.teacher, config.teacher_dtype),
        "compute_dtype": config.compute_dtype,
        "work": dataclasses.asdict(analysis.run.work),
        "assumed": _assumed(analysis),
        "residents": analysis.run.residents,
        "programs": programs,
        "update_seconds": analysis.update_seconds(),
        "compiled": compiled is not None,
        "verdict": worst(program["verdict"] for program in programs),
        "warnings": [line for program in programs for line in _warnings(analysis, program)],
    }


def _model(model: PlannedModel, dtype: str) -> dict[str, Any]:
    specs = jax.tree.leaves(param_specs(model.sizes), is_leaf=is_spec)
    return {
        "name": model.name,
        "source": model.source,
        "parameters": sum(math.prod(spec.shape) for spec in specs),
        "dtype": dtype,
    }


def _assumed(analysis: Analysis) -> list[str]:
    """What the plan could not know, or leaves out."""
    config, teacher = analysis.config, analysis.teacher
    lines = []
    if config.data.source != "players":
        lines.append("every episode takes all its turns and fills its context")
    work = analysis.run.work
    if work.slots_read < work.slots:
        lines.append(
            f"a sampled token reads {work.slots_read:,.0f} of {work.slots:,} cache slots, the mean "
            "over a context that grows evenly; operations are counted with all"
        )
    if config.objective.intervention and teacher:
        lines.append("a question to the judge is as long as a first message and a response")
        if not teacher.has_tokenizer:
            lines.append(f"each of the judge's words has {teacher.label_width} tokens")
        if config.judge.agreement_every:
            lines.append("without the second decoding of `judge.agreement_every`")
    if config.rollout.history_turns:
        lines.append(
            "without what `rollout.history_turns` adds: contexts read anew in each turn, and rows "
            "beyond one an episode"
        )
    return lines


def _program(analysis: Analysis, cost: Cost, result: Mapping[str, Any] | None) -> dict[str, Any]:
    program, found = cost.program, None
    verdict, limit = cost.verdict, analysis.slice.chip.memory
    if result is not None:
        found = dict(result)
        if result["refused"] is None:
            memory = Memory(**result["memory"])
            found["total"] = memory.total + cost.beside
            verdict = compiled_verdict(memory, beside=cost.beside, limit=limit)
        elif verdict == NOT_COMPILED and "RESOURCE_EXHAUSTED" in result["refused"]:
            verdict = MISFIT
    return {
        "name": program.name,
        "runs": program.runs,
        "arguments": cost.arguments,
        "beside": cost.beside,
        "least": cost.least,
        "flops": cost.flops,
        "moved": [dataclasses.asdict(part) | {"total": part.total} for part in program.moved],
        "bound": cost.bound
        and {
            "compute": cost.bound.compute,
            "memory": cost.bound.memory,
            "seconds": cost.bound.seconds,
            "term": cost.bound.term,
        },
        "compiled": found,
        "verdict": verdict,
    }


def _warnings(analysis: Analysis, program: Mapping[str, Any]) -> list[str]:
    """What compiled programs should not do."""
    found, lines = program["compiled"], []
    if not found or found["refused"] is not None:
        return []
    name, parts = program["name"], analysis.config.train.micro_batches
    for part in found["collectives"]:
        if not part["known"]:
            lines.append(
                f"{name}: unknown trip count around {part['kind']} {part['shape']} at "
                f"{part['source']}; what it sends is counted once"
            )
        # In the loop over chunks of the loss; what is done once for a micro-batch is not.
        once = part["sent"] / (part["times"] * part["instances"])
        if part["source"].startswith("losses.py") and part["times"] > parts and once >= _WEIGHTY:
            lines.append(
                f"{name}: {part['kind']} {part['shape']} at {part['source']} in the loss's loop, "
                f"{part['times']} times"
            )
    return lines
