"""A plan's dictionary as text."""

from collections.abc import Iterable, Mapping
from typing import Any

from opd_jax.plan.chips import GIB
from opd_jax.plan.program import COPY
from opd_jax.report.tables import table

COMPILED = "Compiled, not run; times are bounds, not predictions."
NOT_COMPILED = "Nothing was compiled; times are bounds, not predictions."
WITHOUT_COMPILER = (
    "With the extra `plan` (`pip install -e '.[plan]'`) the TPU compiler says the rest: "
    "temporaries, and so whether it fits; collectives; copies."
)
_SHOWN = 6  # collectives and copies of a program


def text(report: Mapping[str, Any], *, can_compile: bool) -> str:
    """The tables of a plan."""
    parts = [_heading(report), _bounds(report), _memory(report)]
    parts += [_traffic(program) for program in report["programs"]]
    parts += ["\n".join(f"warning: {line}" for line in report["warnings"])]
    parts += [_last(report, can_compile=can_compile)]
    return "\n\n".join(part for part in parts if part)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _heading(report: Mapping[str, Any]) -> str:
    chip, work, mesh = report["chip"], report["work"], report["mesh"]
    each = [f"{chip['memory'] / GIB:.2f} GiB usable"] if chip["memory"] else []
    each += [f"{chip['flops'] / 1e12:.0f} TFLOP/s bfloat16"] if chip["flops"] else []
    each += [f"{chip['bandwidth'] / 1e9:.0f} GB/s"] if chip["bandwidth"] else []
    hosts = ""
    if report["hosts"]:
        hosts = f" on {report['hosts']} host{'s' * (report['hosts'] > 1)}"
    lines = {
        report["topology"]: f"{report['chips']} × {chip['name']}{hosts}; each {', '.join(each)}",
        "mesh": " × ".join(f"{name} {size}" for name, size in mesh.items()),
        "changed": "; ".join(report["changed"]),
        "student": _model(report["student"], f", computes in {report['compute_dtype']}"),
        "teacher": report["teacher"] and _model(report["teacher"], ""),
        "update": (
            f"at most {work['rows']} rows of {work['sequence']} tokens, {work['turns']} turns each "
            f"with {work['sampled']} tokens sampled"
        ),
        "assumed": "; ".join(report["assumed"]),
        "all along": _residents(report),
    }
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {line}" for name, line in lines.items() if line)


def _residents(report: Mapping[str, Any]) -> str:
    """What stays on a device, and what only for a while."""
    sizes = {name: _gib(size) for name, size in report["residents"].items() if size}
    copy = sizes.pop(COPY)
    kept = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return f"{kept} GiB on each device; {copy} more while the student samples"


def _model(model: Mapping[str, Any], more: str) -> str:
    billions = model["parameters"] / 1e9
    return f"{billions:.3g} B parameters in {model['dtype']}{more}; {model['source']}"


def _bounds(report: Mapping[str, Any]) -> str:
    rows = [
        {
            "in an update": program["name"],
            "runs": f"{program['runs']:.0f}",
            "TFLOP": _number(program["flops"] / 1e12),
            "GB moved": _number(sum(part["total"] for part in program["moved"]) / 1e9),
            "at least, s": _seconds(program["bound"]["seconds"]),
            "set by": program["bound"]["term"],
            "all runs, s": _seconds(_all_runs(program)),
        }
        for program in report["programs"]
        if program["bound"]
    ]
    if not rows:
        return ""
    lines = ["Work of one device in one run of a program, and the least time at published peaks:"]
    lines += ["", table(rows, list(rows[0]))]
    if report["update_seconds"] is not None:
        lines += [
            "",
            f"An update takes at least {_seconds(report['update_seconds'])} s. {_most(report)}",
        ]
    return "\n".join(lines)


def _all_runs(program: Mapping[str, Any]) -> float | None:
    seconds = program["bound"]["seconds"]
    return None if seconds is None else program["runs"] * seconds


def _most(report: Mapping[str, Any]) -> str:
    """Which program takes most of it, and what of that."""
    timed = [p for p in report["programs"] if p["bound"] and p["bound"]["seconds"] is not None]
    longest = max(timed, key=lambda program: _all_runs(program) or 0.0)
    share = (_all_runs(longest) or 0.0) / report["update_seconds"]
    term = longest["bound"]["term"]
    line = f"{share:.0%} of it: {longest['name']}, set by {term}"
    if term == "memory":
        heaviest = max(longest["moved"], key=lambda part: part["total"])
        line += f", of which {heaviest['what']} most ({_number(heaviest['total'] / 1e9)} GB)"
    return line + "."


def _seconds(value: float | None) -> str:
    return "-" if value is None else _number(value)


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _memory(report: Mapping[str, Any]) -> str:
    limit = report["chip"]["memory"]
    rows = []
    for program in report["programs"]:
        row = {
            "memory of a device, GiB": program["name"],
            "arguments": _gib(program["arguments"]),
            "beside": _gib(program["beside"]),
            "at least": _gib(program["least"]),
        }
        found = program["compiled"]
        if report["compiled"]:
            memory = (found or {}).get("memory")
            row |= {
                name: _gib(memory[name]) if memory else None
                for name in ("temporaries", "code", "peak")
            }
            row["total"] = _gib(found["total"]) if memory else None
        needed = found["total"] if found and "total" in found else program["least"]
        row["of usable"] = f"{needed / limit:.0%}" if limit else None
        row["verdict"] = program["verdict"]
        rows.append(row)
    lines = [table(rows, list(rows[0]))]
    lines += [
        f"{program['name']}: {program['compiled']['refused']}"
        for program in report["programs"]
        if program["compiled"] and program["compiled"]["refused"]
    ]
    return "\n".join(lines)


def _traffic(program: Mapping[str, Any]) -> str:
    """Collectives and copies of one compiled program."""
    found = program["compiled"]
    if not found or found["refused"] is not None:
        return ""
    sent = sum(part["sent"] for part in found["collectives"])
    lines = [f"{program['name']}: each device sends {_number(sent / 1e9)} GB a run"]
    if found["collectives"]:
        lines += ["", table(list(_collectives(found["collectives"])), list(_COLUMNS))]
    for part in found["copies"][:_SHOWN]:
        lines.append(
            f"copy of {part['shape']} ({_gib(part['bytes'])} GiB), {_times(part)}, at "
            f"{part['source']}"
        )
    return "\n".join(lines)


_COLUMNS = ("GB", "collective", "shape on a device", "group", "times", "from")


def _collectives(parts: list[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    for part in parts[:_SHOWN]:
        cells = (
            _number(part["sent"] / 1e9),
            part["kind"],
            _short(part["shape"]),
            str(part["group"]),
            _times(part),
            part["source"],
        )
        yield dict(zip(_COLUMNS, cells, strict=True))
    if rest := parts[_SHOWN:]:
        sent = sum(part["sent"] for part in rest)
        yield {"GB": _number(sent / 1e9), "collective": f"{len(rest)} more"}


def _times(part: Mapping[str, Any]) -> str:
    instances = part["instances"]
    often = f"{part['times']}" if part["known"] else "unknown trip count"
    return often if instances == 1 else f"{often} × {instances}"


def _short(shape: str) -> str:
    first, *others = shape.split("], ")
    return shape if not others else f"{first}] and {len(others)} more"


def _last(report: Mapping[str, Any], *, can_compile: bool) -> str:
    lines = [f"verdict: {report['verdict']}"]
    lines.append(COMPILED if report["compiled"] else NOT_COMPILED)
    if not can_compile:
        lines.append(WITHOUT_COMPILER)
    return "\n".join(lines)
