"""Trains a student agent: roll out, judge, pack, step, write, save.

    python -m opd_jax.train --config=NAME[:arg] --workdir=DIR [--config.x.y=v]

A run that finds a checkpoint in its workdir resumes. It ends with the same bits as a run that was
never interrupted, because an update's random draws depend only on the seed and its number. SIGTERM
saves after the current update, or ends an evaluation after its split; the exit status is then 0.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from opd_jax.compare import compare
from opd_jax.config import build, parse_command_line
from opd_jax.config.models import load_student, load_teacher
from opd_jax.config.settings import Settings, read_settings
from opd_jax.config.workdir import check_tasks, check_workdir, store_run
from opd_jax.evaluate import evaluate_others, evaluate_trained
from opd_jax.experience.source import Source
from opd_jax.judge.verdicts import Labeller
from opd_jax.learner.train_state import TrainState, restore_or_init
from opd_jax.report.log import UpdateLog
from opd_jax.report.tables import results_table
from opd_jax.report.writers import write_summary
from opd_jax.runtime import processes
from opd_jax.runtime.checkpoint import Checkpoints
from opd_jax.runtime.exits import reported
from opd_jax.runtime.mesh import make_mesh
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
    stop: Stop,
    workdir: Path,
) -> TrainState:
    """The algorithm: every update from the state's own number up to `train.updates`."""
    done, updates = int(state.step), settings.train.updates
    while done < updates:
        with log.watch(done + 1) as clock:
            with clock.measure("rollout"):
                # The student plays an episode of each of the next tasks.
                played = source.play(state)
            with clock.measure("judge"):
                # The teacher gives every turn a verdict, [B, K].
                verdict, judged = judge(played.conversations, done)
            batch = pack(played, verdict)
        with clock.measure("update"):
            # The teacher reads the batch, tokens are weighted, the optimizer takes one step.
            state, raw = step(state, batch)
        done += 1
        log.write(done, raw, played.metrics | judged, clock)

        stopping = stop.anywhere()  # read once: the signal may come at any moment
        if done % settings.checkpoint.every == 0 or done == updates or stopping:
            checkpoints.save(done, state, {"cursor": source.cursor})
        if stopping:
            checkpoints.wait()
            processes.say(f"stopped by SIGTERM; update {done} is saved in {workdir}")
            raise SystemExit(0)
    return state


def run(config: FrozenConfigDict, workdir: Path) -> dict[str, Any]:
    """One whole run; returns the `eval` part of its `summary.json`."""
    settings = read_settings(config)
    mesh = make_mesh(**dataclasses.asdict(settings.mesh))
    with jax.set_mesh(mesh):
        return _run(config, settings, workdir, mesh)


def _run(
    config: FrozenConfigDict, settings: Settings, workdir: Path, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    stop = Stop()
    check_workdir(config, settings, workdir)
    panels = build.panels(settings)
    check_tasks(settings, panels, workdir)
    build.check_named(settings)
    student, teacher = load_student(settings, mesh), load_teacher(settings, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=settings.checkpoint.keep)
    untrained, optimizer = build.initial_params(student, settings, mesh), build.optimizer(settings)
    state, meta = restore_or_init(checkpoints, untrained, optimizer, seed=settings.seed)
    store_run(config, settings, panels, workdir)
    if done := int(state.step):
        processes.say(f"resuming after update {done} of {settings.train.updates}")
    else:
        untrained = state.params
    if not settings.lora.rank:  # the state has parameters of its own
        student = dataclasses.replace(student, params={})

    how: dict[str, Any] = dict(panels=panels, after_split=stop.exit_if_set)
    results = evaluate_others(settings, student, untrained, teacher, workdir=workdir, **how)
    del untrained
    log = build.make_log(settings, workdir, done=done)
    tasks, cursor = panels[settings.data.split], meta.get("cursor", [0, 0])
    source = build.make_source(settings, student, teacher, tasks=tasks, cursor=cursor)
    with closing(source), closing(log), closing(checkpoints):
        state = train(
            settings,
            state,
            source=source,
            judge=build.make_labeller(settings, teacher),
            pack=build.make_pack(settings, student.config),
            step=build.make_update(settings, student, teacher, state),
            log=log,
            checkpoints=checkpoints,
            stop=stop,
            workdir=workdir,
        )
    how |= dict(update=int(state.step), known=results.get("after"))
    results["after"] = evaluate_trained(settings, student, state.params, teacher, **how)
    write_summary(workdir / "summary.json", {"eval": results})
    processes.say(results_table(results))
    if stop.anywhere():
        raise SystemExit(0)
    return results


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.train`."""
    with reported():
        config, workdir, _ = parse_command_line(argv, usage=__doc__)
        settings = read_settings(config)
        processes.start()
        with processes.ending_together():
            if settings.compare.methods:
                processes.say(compare(config, workdir, run=run))
            else:
                run(config, workdir)


if __name__ == "__main__":
    main(sys.argv[1:])
