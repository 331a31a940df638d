"""A plan's dictionary as text: one screen, or with `verbose` all of it."""

from collections.abc import Mapping
from typing import Any

from opd_jax.plan.chips import GIB, LATENCY_S
from opd_jax.report.tables import table

_SHOWN = 2  # collectives on one screen
_PEAKS = (
    ("memory", GIB, "GiB"),
    ("flops", 1e12, "TFLOP/s bf16"),
    ("bandwidth", 1e9, "GB/s"),
    ("wires", 1e9, "GB/s to other chips"),
)


def text(report: Mapping[str, Any], *, verbose: bool) -> str:
    """The tables of a plan."""
    parts = [_heading(report), _memory(report, verbose), _seconds(report, verbose)]
    if report["collectives"]:
        parts.append(_collectives(report["collectives"], None if verbose else _SHOWN))
    if verbose:
        rows = [
            {"GB moved in a run": program["name"], "what": what, "GB": size / 1e9}
            for program in report["programs"]
            for what, size in program["moved"].items()
        ]
        parts += [_table(rows), f"assumed: {report['assumed']}"]
    return "\n\n".join(part for part in parts if part)


def _table(rows: list[dict[str, Any]]) -> str:
    return table(rows, list(rows[0]))


def _heading(report: Mapping[str, Any]) -> str:
    chip, work = report["chip"], report["work"]
    how = "compiled, not run"
    if not report["compiled"]:
        how = "nothing was compiled"
        if chip["platform"] == "tpu":
            how += "; with `pip install -e '.[plan]'` the TPU compiler says more"
    peaks = [f"{chip[name] / unit:,.4g} {of}" for name, unit, of in _PEAKS if chip[name]]
    residents = [f"{k} {size / GIB:.2f} GiB" for k, size in report["residents"].items() if size]
    lines = {
        "verdict": f"{report['verdict']} ({how})",
        report["topology"]: ", ".join([f"{report['chips']} × {chip['name']}", *peaks]),
        "mesh": ", ".join(f"{name} {size}" for name, size in report["mesh"].items()),
        "changed": "; ".join(report["changed"]),
        "update": (
            f"at most {work['rows']} rows of {work['sequence']:,} tokens, {work['turns']} turns "
            f"and {work['sampled']:,} sampled tokens in each"
        ),
        "resident": ", ".join(residents),
        "not counted": report["not_counted"],
    }
    for who in ("student", "teacher"):
        if model := report[who]:
            size = f"{model['parameters'] / 1e9:.3g} B parameters in {model['dtype']}"
            lines[who] = f"{size}; {model['source']}"
    shown = {name: line for name, line in lines.items() if line}
    width = max(map(len, shown))
    return "\n".join(f"{name.ljust(width)}  {line}" for name, line in shown.items())


def _memory(report: Mapping[str, Any], verbose: bool) -> str:
    columns = ["arguments", "beside", "temporaries", "code", "peak", "total"]
    if not verbose:
        columns = ["arguments", "temporaries", "peak", "total"]
    if not report["compiled"]:
        columns = ["arguments", "beside", "least"]
    rows = [
        {"GiB on a device": program["name"], "runs": round(program["runs"])}
        | {name: None if program[name] is None else program[name] / GIB for name in columns}
        | {"verdict": program["verdict"]}
        for program in report["programs"]
    ]
    refused = [f"{p['name']}: {p['refused']}" for p in report["programs"] if p["refused"]]
    return "\n".join([_table(rows), *refused])


def _seconds(report: Mapping[str, Any], verbose: bool) -> str:
    total = report["update_seconds"]
    if not total:
        return ""
    least = 0 if verbose else total / 1000
    rows = [
        {
            "seconds, at least": program["name"],
            "by FLOPs": program["by_flops"],
            "by bandwidth": program["by_bandwidth"],
            "by wires": program["by_wires"],
            "all runs": program["runs"] * program["seconds"],
            "waiting": program["runs"] * program["waiting"],
        }
        for program in report["programs"]
        if program["seconds"] is not None and program["runs"] * program["seconds"] >= least
    ]
    share = f"{report['sampling_share']:.0%} of it is sampling"
    end = f"An update takes at least {total:.3g} s; {share}. Times are bounds, not predictions."
    if waiting := report["waiting_seconds"]:
        end += (
            f" Sums over shards that a next layer waits for add {waiting:.3g} s, if each takes "
            f"{LATENCY_S * 1e6:.0f} µs and its bytes."
        )
    return f"{_table(rows)}\n{end}"


def _collectives(rows: list[dict[str, Any]], most: int | None) -> str:
    shown = [
        {
            "collective": row["kind"],
            "program": row["program"],
            "GB a run": row["bytes"] / 1e9,
            "in sequence": row["in_sequence"],
            "group": row["group"],
            "from": row["source"],
        }
        | ({} if most else {"shape": row["shape"]})
        for row in rows[:most]
    ]
    rest = len(rows) - len(shown)
    return _table(shown) + (f"\n{rest} more: --verbose" if rest else "")
