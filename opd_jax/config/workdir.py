"""A run's workdir: whether this run may go on in it, and what says later which run it holds."""

from collections.abc import Mapping
from pathlib import Path

from ml_collections import FrozenConfigDict

from opd_jax.config.settings import Settings, binds_a_run
from opd_jax.config.stored import check_same_run, differences, read_stored, store
from opd_jax.experience.tasks import Panel, check_same_tasks, store_tasks
from opd_jax.runtime import processes


def check_workdir(config: FrozenConfigDict, settings: Settings, workdir: Path) -> None:
    """Makes sure that the workdir holds no run with another config.

    Before its first checkpoint a run has nothing to continue, and a mistake may be corrected.

    Raises:
      ValueError: it holds a checkpoint of such a run.
    """
    if _has_checkpoint(workdir):
        check_same_run(config, workdir, binds=binds_a_run(settings))


def check_tasks(settings: Settings, panels: Mapping[str, Panel], workdir: Path) -> None:
    """Makes sure that a run goes on with the training tasks that it was started on.

    Raises:
      ValueError: the workdir holds a checkpoint of a run on other tasks.
    """
    if _has_checkpoint(workdir):
        check_same_tasks(settings.data.split, panels[settings.data.split], workdir)


def _has_checkpoint(workdir: Path) -> bool:
    return processes.first(any((workdir / "checkpoints").glob("[0-9]*")))


def store_run(
    config: FrozenConfigDict, settings: Settings, panels: Mapping[str, Panel], workdir: Path
) -> None:
    """Writes `config.json` and the digests of the tasks. Everything that they name was found.

    A run that was corrected before its first checkpoint loses its figures: they are of another run.
    """
    if processes.is_first():
        stored, binds = workdir / "config.json", binds_a_run(settings)
        if stored.exists() and differences(read_stored(stored), config, binds=binds):
            (workdir / "summary.json").unlink(missing_ok=True)
        store(config, workdir)
    store_tasks(panels, workdir)
