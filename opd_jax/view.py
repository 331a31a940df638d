"""Shows episodes: one HTML file that any browser opens, without a network.

    python -m opd_jax.view runs/quickstart
    python -m opd_jax.view runs/quickstart/episodes/update-000020.jsonl --out=episodes.html

It is given an episode file (docs/episodes.md), or a workdir, of which all in `episodes/` are shown.
The page lies beside the file, or is WORKDIR/episodes.html, unless --out says otherwise. It has at
most 20 MB: where that is too little, top fives are left out first, then episodes of the earliest
updates, and it says so.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from opd_jax.report.viewer import make_page, read_episodes
from opd_jax.runtime import bucket
from opd_jax.runtime.exits import print_line, printed, reported
from opd_jax.runtime.files import replace_text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def view(source: Path, out: Path | None = None) -> str:
    """Writes the page of an episode file, or of those in a workdir; returns what there is to say.

    Raises:
      ValueError: there are no episodes, a line is none, or `out` is one of the files read.
    """
    sources = [source]
    if source.is_dir():
        sources = sorted((source / "episodes").glob("*.jsonl"))
        if not sources:
            raise ValueError(
                f"`{source}` has no episodes/*.jsonl; give an episode file, or the workdir of a "
                "run that wrote episodes"
            )
    out = out or (source / "episodes.html" if source.is_dir() else source.with_suffix(".html"))
    if out.resolve() in [path.resolve() for path in sources]:
        raise ValueError(f"`--out`: `{out}` is what is to be shown; give another file")
    episodes = [episode for path in sources for episode in read_episodes(path)]
    page = make_page(episodes, title=printed(str(source)))
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, page.html)
    bucket.upload(out)
    written = f"{page.shown} episodes written to {out} ({out.stat().st_size / 1e6:.1f} MB)"
    return "\n".join([written, *([page.left_out] if page.left_out else [])])


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.view`."""
    with reported():
        parser = _Parser(
            prog="python -m opd_jax.view",
            description=__doc__,
            usage=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument("source", metavar="FILE|WORKDIR")
        parser.add_argument("--out", metavar="FILE.html")
        flags = parser.parse_args(argv)
        out = bucket.place(flags.out, name="--out", is_new=True) if flags.out else None
        print_line(view(bucket.place(flags.source, name="FILE|WORKDIR"), out), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
