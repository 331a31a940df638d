"""Markdown tables, among them those of episodes' figures and of the judge's.

These two take `{who: {split: figures}}`, as in `summary.json`. A split whose figures are None is
left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Formats rows as a Markdown table that is aligned as plain text too.

    Args:
      rows: mappings from column to cell. A missing cell or None shows as ``-``, a float with four
        significant digits.
      columns: headings, in order. A column of numbers is aligned to the right.
    """
    # Not `rich`: its Markdown has no colons for alignment, and it reads "[...]" as markup.
    aligned = []
    for column in columns:
        values = [row.get(column) for row in rows]
        numeric = all(isinstance(value, (int, float, type(None))) for value in values)
        cells = [_cell(value) for value in values]
        width = max(3, len(_cell(column)), *map(len, cells))
        rule = "-" * (width - 1) + (":" if numeric else "-")
        lines = [_cell(column), rule, *cells]
        aligned.append([line.rjust(width) if numeric else line.ljust(width) for line in lines])
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*aligned, strict=True))


def results_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of everybody's figures. Lines below it name who never acted.

    Scores are shown only if they differ from success, broken episodes only if there are any.
    """
    found = _labelled(results)
    rows = [
        {
            "who": who,
            "split": split,
            "success": f"{r['success']:.1%}",
            "95 % interval": f"{r['ci95'][0]:.1%} to {r['ci95'][1]:.1%}",
            "score": f"{r['score']:.2f}",
            **{name: f"{value:.3f}" for name, value in r["measures"].items()},
            "turns": f"{r['turns']:.1f}",
            "repeated": f"{r['repeated']:.1%}",
            "failed": f"{r['failed']:.1%}",
            "n": r["n"],
            "broken": r["broken"],
        }
        for who, split, r in found
    ]
    columns = [
        *("who", "split", "success", "95 % interval"),
        *(["score"] if any(r["score"] != r["success"] for *_, r in found) else []),
        *sorted({name for *_, r in found for name in r["measures"]}),
        *("turns", "repeated", "failed", "n"),
        *(["broken"] if any(r["broken"] for *_, r in found) else []),
    ]
    idle = [
        f"{who} on {split}: no turn held an action that could be carried out."
        for who, split, r in found
        if r["failed"] == 1.0
    ]
    return "\n\n".join([table(rows, columns), *idle])


def judge_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of the judge's figures on everybody's turns; "" if there are none."""
    rows = [
        {
            "turns of": who,
            "split": split,
            "balanced accuracy": _hundredths(j["balanced_accuracy"]),
            "95 % interval": " to ".join(map(_hundredths, j["ci95"] or [])),
            "always SKIP": _hundredths(j["always_skip"]),
            "precision": _hundredths(j["precision"]),
            "recall": _hundredths(j["recall"]),
            "n": j["n"],
        }
        for who, split, r in _labelled(results)
        if (j := r.get("judge"))
    ]
    return table(rows, list(rows[0])) if rows else ""


def audit_tables(who: str, figures: Mapping[str, Any]) -> str:
    """Markdown tables of an audit's figures (`audit`), with what it cost the teacher below."""
    turns = [
        {
            "turns of": who,
            "label": label,
            "turns": of["turns"],
            "tokens": _percent(of["tokens"]),
            "divergence": _percent(of["divergence"]),
            "asked": of["asked"],
            "teacher fails there": _rate(of, "failed"),
            "is right there": _rate(of, "right"),
            **({"by the rule": _rate(of, "right_by_rule")} if "right_by_rule" in of else {}),
        }
        for label, of in figures["turns"].items()
    ]
    weights = [
        {"weights": name, "tokens": _percent(of["tokens"]), "on right": _percent(of["reliable"])}
        for name, of in figures["weights"].items()
    ]
    ranking = [
        {"AUC of": score, **{label: _auc(found) for label, found in of.items()}}
        for score, of in figures["auc"].items()
    ]
    after = [
        {
            "after turns": turns,
            "still running": of["n"],
            "teacher wins": _rate(of, "success"),
            "with those won before": _rate(of, "of_all"),
            "read": of["read"],
            "sampled": of["sampled"],
        }
        for turns, of in figures.get("take_over", {}).items()
    ]
    cost = {"own turns of the teacher": "teacher_tokens", "those of the proxy": "proxy_tokens"}
    told = "; ".join(
        f"{what}: {figures[name]['read']} tokens read, {figures[name]['sampled']} sampled"
        for what, name in cost.items()
        if name in figures
    )
    tables = [table(rows, list(rows[0])) for rows in (turns, weights, ranking, after) if rows]
    return "\n\n".join([tables[0], told, *tables[1:]])


def _rate(figures: Mapping[str, Any], name: str) -> str:
    low, high = figures[f"{name}_ci95"]
    return f"{_percent(figures[name])} [{100 * low:.1f}, {100 * high:.1f}]"


def _auc(figures: Mapping[str, Any]) -> str:
    if figures["auc"] is None:
        return "-"
    low, high = figures["ci95"]
    return f"{figures['auc']:.2f} [{low:.2f}, {high:.2f}]"


def _percent(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.1%}"


def _hundredths(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def split_label(split: str, figures: Mapping[str, Any]) -> str:
    """A split's name in tables, with the label of its digest: `valid_seen (generated)`."""
    label = figures.get("digest", "").rpartition("-")[0]
    return f"{split} ({label})" if label else split


def _labelled(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, dict[str, Any]]]:
    """(who, label of the split, figures) of every evaluation."""
    return [
        (who, split_label(split, figures), figures)
        for who, splits in results.items()
        for split, figures in splits.items()
        if figures is not None
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
