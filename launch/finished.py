"""Whether a run is finished. A status of 0 from training does not say so.

    .venv/bin/python launch/finished.py [the arguments of opd_jax.train]

Training exits with 0 when SIGTERM stops it, too. This script exits with 0 if the student is
evaluated after the last update, or if every cell of a comparison has its result file. It exits with
75 ("try again later" in sysexits.h) if the same training command would find more to do.
"""

import sys
from collections.abc import Sequence

from opd_jax.compare import cells_of
from opd_jax.config import build, parse_command_line
from opd_jax.config.settings import read_settings
from opd_jax.evaluate import is_evaluated
from opd_jax.report.writers import read_summary
from opd_jax.runtime.exits import WORLD, reported


def main(argv: Sequence[str]) -> int:
    """The status to exit with."""
    config, workdir, _ = parse_command_line(argv, usage=__doc__, profile="")
    if config.compare.methods:
        return 0 if all(cell.is_done() for cell in cells_of(config, workdir)) else WORLD
    after = read_summary(workdir / "summary.json").get("eval", {}).get("after")
    settings = read_settings(config)
    # With a constant schedule a run may have done more updates than are asked for now.
    # A mean over splits has no update of its own.
    splits = [figures for figures in (after or {}).values() if figures]
    done = [figures["update"] for figures in splits if "update" in figures]
    update = max([settings.train.updates, *done])
    panels = build.eval_panels(settings)
    return 0 if is_evaluated(after, settings, panels=panels, update=update) else WORLD


if __name__ == "__main__":
    with reported():
        sys.exit(main(sys.argv[1:]))
