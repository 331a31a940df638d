"""A run's workdir: checks that the run may go on in it, and records which run it holds."""

import json
from collections.abc import Mapping
from pathlib import Path

from ml_collections import FrozenConfigDict

from opd_jax import hf
from opd_jax.config.models import model_folder
from opd_jax.config.settings import Settings, binds_a_run
from opd_jax.config.stored import check_same_run, differences, read_stored, store
from opd_jax.experience.tasks import Panel, check_same_tasks, store_tasks
from opd_jax.report.writers import read_summary
from opd_jax.runtime import processes
from opd_jax.runtime.files import replace_text

MODELS_FILE = "models.json"


def check_workdir(config: FrozenConfigDict, settings: Settings, workdir: Path) -> None:
    """Checks that the workdir holds no run with another config.

    A run without a checkpoint may be started again with a corrected config.

    Raises:
      ValueError: it holds a checkpoint of a run with another config or other models.
    """
    if _has_checkpoint(workdir):
        check_same_run(config, workdir, binds=binds_a_run(settings))
        check_models(settings, workdir)


def check_models(settings: Settings, workdir: Path) -> None:
    """Checks that the models are those that the workdir's run has, wherever they lie now.

    Raises:
      ValueError: one is another.
    """
    had = read_summary(workdir / MODELS_FILE)
    for who, now in _fingerprints(settings).items():
        if had.get(who) not in (None, now):
            raise ValueError(
                f"`{who}` = {getattr(settings, who)!r} is not the model that the run in "
                f"`{workdir}` has (fingerprint {had[who]} then, {now} now); give the same model, "
                "or choose another --workdir"
            )


def _fingerprints(settings: Settings) -> dict[str, str]:
    named = {"student": settings.student, "teacher": settings.teacher}
    return {
        who: hf.fingerprint(model_folder(reference))
        for who, reference in named.items()
        if reference not in ("", "new")
    }


def check_tasks(settings: Settings, panels: Mapping[str, Panel], workdir: Path) -> None:
    """Checks that the workdir holds no checkpoint of a run on other training tasks.

    Raises:
      ValueError: it does.
    """
    if _has_checkpoint(workdir):
        check_same_tasks(settings.data.split, panels[settings.data.split], workdir)


def _has_checkpoint(workdir: Path) -> bool:
    return processes.first(any((workdir / "checkpoints").glob("[0-9]*")))


def store_run(
    config: FrozenConfigDict, settings: Settings, panels: Mapping[str, Panel], workdir: Path
) -> None:
    """Writes `config.json`, the fingerprints of the models and the digests of the tasks.

    Call it after everything the config names has been found. If the config was corrected before the
    first checkpoint, old figures are deleted: they belong to another run.
    """
    if processes.is_first():
        stored, binds = workdir / "config.json", binds_a_run(settings)
        if stored.exists() and differences(read_stored(stored), config, binds=binds):
            (workdir / "summary.json").unlink(missing_ok=True)
        store(config, workdir)
        replace_text(workdir / MODELS_FILE, json.dumps(_fingerprints(settings), indent=2) + "\n")
    store_tasks(panels, workdir)
