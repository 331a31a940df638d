"""Trains a student agent: roll out, judge, pack, step, write, save.

    python -m opd_jax.train --config=quickstart:runlocal --workdir=runs/try --profile=2:3
    python -m opd_jax.train --config=quickstart --workdir=runs/a --config.train.updates=200

A run that finds a checkpoint in its workdir resumes; it ends as if it was never interrupted, to the
bit. SIGTERM and Ctrl-C save what is finished. `--profile=FROM:TO` traces updates (DIR/profile).
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from opd_jax.compare import compare
from opd_jax.config import build, parse_command_line, records
from opd_jax.config.models import load_student, load_teacher
from opd_jax.config.settings import Settings, read_settings
from opd_jax.config.workdir import check_run, store_run
from opd_jax.evaluate import Dev, evaluate_others, evaluate_trained
from opd_jax.experience.source import Source
from opd_jax.judge.verdicts import Labeller
from opd_jax.learner.train_state import TrainState, is_whole, restore_or_init
from opd_jax.report.log import UpdateLog
from opd_jax.report.tables import results_table
from opd_jax.runtime import processes
from opd_jax.runtime.checkpoint import Checkpoints
from opd_jax.runtime.exits import reported
from opd_jax.runtime.lease import held
from opd_jax.runtime.profile import updates_to_profile
from opd_jax.runtime.stop import Stop


def train(
    settings: Settings,
    state: TrainState,
    *,
    source: Source,
    judge: Labeller,
    pack: Callable,
    step: build.Update,
    log: UpdateLog,
    checkpoints: Checkpoints,
    measure: Callable[[int, TrainState], bool],
    between: Callable[[], None],
) -> TrainState:
    """The algorithm: every update from the state's own number up to `train.updates`.

    Between updates, `between` is called, and `measure` evaluates the student where that is due and
    says whether it is the best so far. Whatever ends them, what is finished is saved first.
    """
    done, saved, cursor = int(state.step), int(state.step), source.cursor
    try:
        measure(done, state)  # where an earlier start was stopped before it could
        while done < settings.train.updates:
            between()
            with log.watch(done + 1) as clock:
                with clock.measure("rollout"):
                    # The student plays an episode of each of the next tasks.
                    played = source.play(state)
                with clock.measure("judge"):
                    # The teacher gives every turn a verdict, [B, K].
                    judged = judge(played.conversations, done)
                batch = pack(played, judged.verdict, judged.labels)
                log.look(state, batch, played, judged.judgement)  # at a few episodes, now and then
            with clock.measure("update"):
                # The teacher scores the batch, tokens are weighted, the optimizer takes one step.
                after, raw = step(state, batch, judged.hidden)
            log.write(done + 1, raw, played.metrics | judged.metrics, clock)
            state, done, cursor = after, done + 1, source.cursor
            if measure(done, state) or settings.is_saved(done):
                checkpoints.save(done, state, {"cursor": cursor})
                saved = done
    except BaseException as error:
        if done > saved and is_whole(state) and processes.can_save(error):
            checkpoints.save(done, state, {"cursor": cursor})
            checkpoints.wait()
            processes.say(f"update {done} is saved in {checkpoints.directory.parent}")
        raise
    return state


def run(config: FrozenConfigDict, workdir: Path, profile: Sequence[int] = ()) -> dict[str, Any]:
    """One whole run; returns the `eval` part of its `summary.json`."""
    settings = read_settings(config)
    with jax.set_mesh(build.open_mesh(settings)), held(workdir) as workdir, Stop() as stop:
        return _run(config, settings, workdir, stop, profile)


def _run(
    config: FrozenConfigDict, settings: Settings, workdir: Path, stop: Stop, profile: Sequence[int]
) -> dict[str, Any]:
    mesh = jax.sharding.get_mesh()
    panels = check_run(config, settings, workdir)
    student, teacher = load_student(settings, mesh), load_teacher(settings, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=settings.checkpoint.keep)
    untrained, optimizer = build.initial_params(student, settings, mesh), build.optimizer(settings)
    state, meta = restore_or_init(checkpoints, untrained, optimizer, seed=settings.seed)
    store_run(config, settings, panels, workdir)
    if done := int(state.step):
        processes.say(f"resuming after update {done} of {settings.train.updates}")
    else:
        untrained = state.params
    student = build.only_frozen(student, settings)  # the state has what is trained
    how: dict[str, Any] = dict(panels=panels, workdir=workdir, between=stop.check)
    results = evaluate_others(settings, student, untrained, teacher, **how)
    del untrained
    log = records.make_log(settings, student, teacher, workdir, done=done, profile=profile)
    new: dict[str, Any] = dict(tasks=panels[settings.data.tasks], between=stop.check)
    source = build.make_source(settings, student, teacher, cursor=meta.get("cursor", (0, 0)), **new)
    with closing(source), closing(log), closing(checkpoints):
        state = train(
            settings,
            state,
            source=source,
            judge=build.make_labeller(settings, teacher, student, source.envs, stop.check),
            pack=build.make_pack(settings, student.config),
            step=build.make_update(settings, student, teacher, state),
            log=log,
            checkpoints=checkpoints,
            measure=Dev(settings, student, log=log, checkpoints=checkpoints, **how),
            between=stop.check,
        )
    how |= dict(update=int(state.step), known=results.get("after"))
    results["after"] = evaluate_trained(settings, student, state.params, teacher, **how)
    processes.say(results_table(results))
    stop.check()
    return results


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.train`."""
    with reported():
        config, workdir, flags = parse_command_line(argv, usage=__doc__, profile="")
        settings = read_settings(config)
        profile = updates_to_profile(flags["profile"], updates=settings.train.updates)
        processes.start()
        with processes.ending_together():
            if settings.compare.methods:
                processes.say(compare(config, workdir, run=lambda one, at: run(one, at, profile)))
            else:
                run(config, workdir, profile)


if __name__ == "__main__":
    main(sys.argv[1:])
