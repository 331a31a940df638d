"""A run's workdir: checks that the run may go on in it, and records which run it holds."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from ml_collections import FrozenConfigDict

from opd_jax.config.build import check_named, check_shapes, panels
from opd_jax.config.references import MODELS, MODELS_FILE, find_models, fingerprints
from opd_jax.config.settings import Settings, binds_a_run, binds_an_evaluation
from opd_jax.config.stored import (
    check_same_run,
    closest_run,
    differences,
    read_stored,
    store,
    to_json,
)
from opd_jax.experience.tasks import Panel, check_same_tasks, store_tasks
from opd_jax.report.wandb import check_installed
from opd_jax.report.writers import read_summary
from opd_jax.runtime import bucket, processes
from opd_jax.runtime.checkpoint import check_saves, saved_steps
from opd_jax.runtime.files import check_subfolder, read_json, replace_text

# The config of a comparison. Its runs have workdirs of their own, so it has no `config.json`.
COMPARISON_FILE = "comparison.json"


def check_run(config: FrozenConfigDict, settings: Settings, workdir: Path) -> dict[str, Panel]:
    """Checks what can be checked before a model is loaded; returns the tasks of the run's splits.

    A run without a checkpoint may be started again with a corrected config.

    Raises:
      ValueError: the workdir holds a checkpoint of a run with another config, other models or other
        training tasks, or a comparison; its subfolders cannot be written; or there is no such
        player.
    """
    for name in ("checkpoints", "events", "episodes"):
        check_subfolder(workdir / name)
    check_saves(workdir / "checkpoints")
    check_may_hold_a_run(workdir)
    has_checkpoint = _has_checkpoint(workdir)
    if has_checkpoint:
        check_same_run(config, workdir, binds=binds_a_run(settings))
        check_models(settings, workdir)
    found = panels(settings)
    if has_checkpoint:
        check_same_tasks(settings.data.tasks, found[settings.data.tasks], workdir)
    check_named(settings)
    check_shapes(settings)
    check_installed(settings.wandb)
    _warn_of_rounding(settings)
    _warn_of_one_model(settings)
    return found


def _warn_of_rounding(settings: Settings) -> None:
    """Warns where most updates would be lost: a parameter in bfloat16 keeps 8 bits of a sum.

    AdamW's steps are about as large as its rate, and weights of language models about 0.02.
    """
    rate = settings.optimizer.learning_rate
    if settings.dtype == "bfloat16" and rate < 0.02 * 2**-9:
        processes.warn(
            f"`dtype` = bfloat16 rounds most steps of `optimizer.learning_rate` = {rate:g} away, "
            "so most parameters will stay as they are: set `dtype` to float32 (`compute_dtype` may "
            "stay bfloat16)"
        )


def _warn_of_one_model(settings: Settings) -> None:
    """Warns where the student is its own teacher: every divergence is 0, and nothing is learnt."""
    places = {model.place for model in find_models(settings).values()}
    if settings.objective.needs_teacher and settings.student != "new" and len(places) == 1:
        processes.warn(
            "`student` and `teacher` are one model, %s, so there is nothing to learn: name a "
            "larger one of its family as the teacher",
            settings.student,
        )


def check_may_hold_a_run(workdir: Path) -> None:
    """Checks that the workdir holds neither a comparison nor a model.

    One summary would mix figures of a comparison and a run. A model's `config.json` would be lost.
    """
    if (workdir / COMPARISON_FILE).exists():
        raise ValueError(
            f"`{workdir}` holds a comparison; its runs are in METHOD/seed-N below it; choose one "
            "of them, or another --workdir"
        )
    config = workdir / "config.json"
    if config.is_file() and "rollout" not in read_json(config):
        raise ValueError(
            f"`{config}` is not the config of a run, which would overwrite it: is `{workdir}` the "
            "folder of a model? choose another --workdir"
        )


def check_comparison(workdir: Path) -> None:
    """Checks that a comparison's workdir holds no run or evaluation of its own."""
    if (workdir / "config.json").exists():
        raise ValueError(
            f"`{workdir}` holds a run, and a comparison would mix its figures with those of the "
            "run; choose another --workdir"
        )


def store_comparison(config: FrozenConfigDict, workdir: Path) -> None:
    """Writes the comparison's config, which marks the workdir as a comparison's."""
    if processes.is_first():
        replace_text(workdir / COMPARISON_FILE, to_json(config))
        bucket.upload(workdir / COMPARISON_FILE)


def check_models(
    settings: Settings, workdir: Path, models: Collection[str] = MODELS
) -> dict[str, str]:
    """Checks that the `models` are those that the workdir's run has, wherever they lie now.

    With the teacher also `judge.model` and the text of `judge.prompt`. Returns their fingerprints.

    Raises:
      ValueError: one is another, or its folder is not there.
    """
    had, found = read_summary(workdir / MODELS_FILE), fingerprints(settings, models)
    for who, now in found.items():
        if had.get(who) not in (None, now):
            kind, own = ("text" if who == "judge.prompt" else "model"), settings.judge
            given = {"judge.prompt": own.prompt, "judge.model": own.model}.get(who)
            given = given or getattr(settings, who)
            raise ValueError(
                f"`{who}` = {given!r} is not the {kind} that the run in "
                f"`{workdir}` has (fingerprint {had[who]} then, {now} now); give the same {kind}, "
                "or choose another --workdir"
            )
    return found


def check_checkpoint(workdir: Path) -> None:
    """Checks that the workdir holds a checkpoint.

    Raises:
      ValueError: it does not; names workdirs near it that are spelt alike.
    """
    if not _has_checkpoint(workdir):
        raise ValueError(
            f"`{workdir}` has no checkpoint{closest_run(workdir)}; `--untrained` takes the student "
            "before any update"
        )


def _has_checkpoint(workdir: Path) -> bool:
    directory = workdir / "checkpoints"
    return processes.first(processes.is_first() and bool(saved_steps(directory)))


def store_run(
    config: FrozenConfigDict, settings: Settings, found: Mapping[str, Panel], workdir: Path
) -> None:
    """Writes `config.json`, the fingerprints of the models and the digests of the tasks.

    Call it after everything the config names has been found. Figures that there are of another run
    are deleted: those of a trained student if the method differs, all if what is evaluated does.
    """
    models = fingerprints(settings)
    if processes.is_first():
        if not _knows_models(models, workdir) or _differs(
            config, workdir, binds_an_evaluation(settings, teacher=True)
        ):
            (workdir / "summary.json").unlink(missing_ok=True)
        elif _differs(config, workdir, binds_a_run(settings)):
            _forget_trained(workdir / "summary.json")
        store(config, workdir)
        _store_models(models, workdir)
    store_tasks(found, workdir)


def _differs(config: FrozenConfigDict, workdir: Path, binds: Callable[[str], bool]) -> bool:
    stored = workdir / "config.json"
    return not stored.exists() or bool(differences(read_stored(stored), config, binds=binds))


def _knows_models(models: Mapping[str, str], workdir: Path) -> bool:
    """Whether the figures are of these models. An evaluation may have had some of them, or none."""
    known = workdir / MODELS_FILE
    return known.exists() and read_summary(known).items() <= models.items()


def _forget_trained(summary: Path) -> None:
    before = read_summary(summary)
    figures = {name: value for name, value in before.items() if name != "best"}
    if "eval" in figures:
        figures["eval"] = {
            who: found
            for who, found in figures["eval"].items()
            if who not in ("after", "dev") and not who.startswith("step-")
        }
    if figures != before:
        replace_text(summary, json.dumps(figures, indent=2) + "\n")


def store_evaluation(config: FrozenConfigDict, models: Mapping[str, str], workdir: Path) -> None:
    """Writes what an evaluation's figures are of, unless a run has: its config and its models.

    `models` are the fingerprints of those that it has loaded (`check_models`).
    """
    if processes.is_first():
        if not (workdir / "config.json").exists():
            store(config, workdir)
        _store_models({**models, **read_summary(workdir / MODELS_FILE)}, workdir)


def _store_models(models: Mapping[str, str], workdir: Path) -> None:
    replace_text(workdir / MODELS_FILE, json.dumps(models, indent=2) + "\n")
