"""A report as one HTML page that needs no other file and no network."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from opd_jax.report.runs import Group, changed_fields
from opd_jax.runtime.exits import printed

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; }}
body {{ padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.5rem; }}
figure {{ margin: 1rem 0; }}
img {{ max-width: 100%; height: auto; background: #fff; border-radius: 6px; }}
figcaption {{ opacity: .75; font-size: .9rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #8884; }}
td {{ white-space: nowrap; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def page(groups: Sequence[Group], figures: Mapping[str, tuple[bytes, str]]) -> str:
    """The page: which runs, how they ended, the figures (name to PNG and caption), the configs."""
    title = " and ".join(dict.fromkeys(group.label for group in groups))
    parts = ["<h2>Runs</h2>", _table(_runs(groups))]
    if evaluated := _evaluations(groups):
        parts += ["<h2>Evaluations</h2>", _table(evaluated)]
    for name, (png, caption) in figures.items():
        data = base64.b64encode(png).decode()
        parts.append(
            f'<h2>{escape(name.capitalize())}</h2>\n<figure><img alt="{escape(name)}" '
            f'src="data:image/png;base64,{data}"><figcaption>{escape(caption)}</figcaption></figure>'
        )
    if changed := changed_fields(groups):
        parts += ["<h2>What differs in their configs</h2>", _table(changed)]
    return _PAGE.format(title=escape(title), body="\n".join(parts))


def _runs(groups: Sequence[Group]) -> list[dict[str, Any]]:
    return [
        {
            "run": group.label,
            "seed": run.config.get("seed"),
            "updates": f"{run.lines[-1]['step']} of {run.config.get('train.updates', '?')}",
            "workdir": printed(str(run.workdir)),
        }
        for group in groups
        for run in group.runs
    ]


def _evaluations(groups: Sequence[Group]) -> list[dict[str, Any]]:
    return [
        {
            "run": group.label,
            "split": split,
            "update": one.update,
            "success": f"{one.success:.1%}",
            "95 % interval": f"{one.low:.1%} to {one.high:.1%}",
        }
        for group in groups
        for split, found in group.evaluations().items()
        for one in found
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{escape(str(name))}</th>" for name in rows[0])
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in row.values()) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'
