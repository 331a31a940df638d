"""Curves of one or several runs: a page that opens without a network, and a PNG of each figure.

    python -m opd_jax.report --workdir=runs/quickstart
    python -m opd_jax.report --workdir=runs/opd-0 --workdir=runs/opd-1 --workdir=runs/sage-0
    python -m opd_jax.report --workdir=runs/comparison --out=report

Runs are drawn over each other. Those whose configs differ only by the seed become one line with a
band; a workdir of a comparison stands for all its runs. A run may still be training. matplotlib
draws: `pip install 'opd-jax[report]'`.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from opd_jax.report.curves import figures
from opd_jax.report.page import page
from opd_jax.report.runs import read_groups
from opd_jax.runtime import bucket
from opd_jax.runtime.exits import print_line, reported
from opd_jax.runtime.files import replace_bytes, replace_text


def report(workdirs: Sequence[Path], out: Path) -> list[Path]:
    """Writes `index.html` and `FIGURE.png` of runs into `out`; returns the paths.

    Raises:
      ValueError: a workdir holds no run, or matplotlib is not installed.
    """
    groups = read_groups(workdirs)
    drawn = {}
    for name, (figure, caption) in figures(groups).items():
        png = io.BytesIO()
        figure.savefig(png, format="png")
        drawn[name] = png.getvalue(), caption
    out.mkdir(parents=True, exist_ok=True)
    for name, (data, _) in drawn.items():
        replace_bytes(out / f"{name}.png", data)
    replace_text(out / "index.html", page(groups, drawn))
    bucket.upload(out)
    return [out / "index.html", *(out / f"{name}.png" for name in drawn)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.report`."""
    with reported():
        parser = _Parser(
            prog="python -m opd_jax.report",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        where = "a run's or a comparison's; give it once for each"
        parser.add_argument("--workdir", metavar="DIR", action="append", required=True, help=where)
        where = "folder of the report (default: `report` in the first workdir)"
        parser.add_argument("--out", metavar="DIR", help=where)
        flags = parser.parse_args(argv)
        workdirs = [bucket.place(text, name="--workdir") for text in flags.workdir]
        out = workdirs[0] / "report"
        if flags.out:
            out = bucket.place(flags.out, name="--out", is_new=True)
        for path in report(workdirs, out):
            print_line(str(path), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
