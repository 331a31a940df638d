"""Train a student agent: roll out, judge, update, evaluate.

    python -m opd_jax.train --config=configs/NAME.py[:arg] --workdir=DIR [--config.x.y=v]

A run that finds a checkpoint in its workdir resumes, and ends with the very parameters that an
uninterrupted run ends with: whatever an update draws is a function of the seed and of the update's
number. SIGTERM saves after the update under way, or ends an evaluation after the split under way,
and exits with status 0.
"""

import dataclasses
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import FrozenConfigDict

from opd_jax import config as cfg
from opd_jax.compare import compare
from opd_jax.config import build as experiment
from opd_jax.config.build import LoadedModel
from opd_jax.evaluate import evaluate_model, evaluate_player, is_evaluated
from opd_jax.experience import environments
from opd_jax.experience.players import check_players
from opd_jax.experience.source import VERDICT_NAMES, Experience, Source, make_source
from opd_jax.learner.batch import Batch
from opd_jax.learner.train_state import TrainState, abstract_state, init_state, placement_of
from opd_jax.learner.train_step import make_train_step
from opd_jax.model import Params
from opd_jax.report.metrics import means
from opd_jax.report.progress import progress_line
from opd_jax.report.stopwatch import Stopwatch
from opd_jax.report.tables import results_table
from opd_jax.report.writers import EventWriter, JsonlWriter, read_summary, write_summary
from opd_jax.runtime import processes
from opd_jax.runtime.checkpoint import Checkpoints
from opd_jax.runtime.mesh import make_mesh, shard_batch

# May differ between a run and its continuation: they change nothing that is trained, and another
# mesh only the order of sums, unless batches are made for it.
_FREE_FIELDS = ("eval", "checkpoint")


def _free_fields(config: FrozenConfigDict) -> tuple[str, ...]:
    return _FREE_FIELDS if config.data.source == "players" else (*_FREE_FIELDS, "mesh")


_Update = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]


def run(config: FrozenConfigDict, workdir: Path) -> dict[str, Any]:
    """One whole run, from the config to `summary.json`, whose `eval` part is returned."""
    mesh = make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        return _run(config, workdir, mesh)


def _run(config: FrozenConfigDict, workdir: Path, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    stop = _stop_on_sigterm()
    write = processes.is_first()
    # Until it has saved something there is nothing to continue, and a mistake may be corrected.
    resumes = processes.first(any((workdir / "checkpoints").glob("[0-9]*")))
    if resumes:
        cfg.check_same_run(config, workdir, ignore=_free_fields(config))
    panels = environments.panels(config)  # there is every split that it names
    if resumes:
        environments.check_same_tasks(config.data.split, panels[config.data.split], workdir)
    check_players(config)
    student, teacher = experiment.load_pair(config, mesh)
    optimizer = experiment.make_optimizer(config)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    untrained = experiment.initial_params(student, config, mesh)
    state, meta = _start(config, untrained, optimizer, checkpoints)
    # Not before everything it names was found good: a run may be started again with its mistakes
    # corrected.
    _store_config(config, workdir)
    environments.store_tasks(panels, workdir)
    done = int(state.step)
    if done:
        processes.say(f"resuming after update {done} of {config.train.updates}")
    else:
        untrained = state.params
    # What was loaded is let go, unless adapters are trained beside it: the state has its own.
    if not config.lora.rank:
        student = dataclasses.replace(student, params={})

    results = _evaluate_others(config, student, untrained, teacher, workdir, stop, write=write)
    del untrained
    source = make_source(config, student=student, teacher=teacher, cursor=meta["cursor"])
    update = _make_update(config, student, teacher, optimizer, state, mesh)
    state = _train(config, state, source, update, checkpoints, workdir, stop, write=write)

    done = int(state.step)
    if not is_evaluated(results.get("after"), config, update=done):
        params = experiment.make_sampling_params(state.params, student, config)
        results["after"] = evaluate_model(
            config, student, params, update=done, judging=teacher, after_split=stop.end_if_set
        )
    write_summary(workdir / "summary.json", {"eval": results}, write=write)
    processes.say(results_table(results))
    if stop.anywhere():
        raise SystemExit(0)
    return results


def _make_update(
    config: FrozenConfigDict,
    student: LoadedModel,
    teacher: LoadedModel | None,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: jax.sharding.Mesh,
) -> _Update:
    """The compiled step, from a batch on the host to metrics on the host; donates its state."""
    players = config.data.source == "players"  # batches of however many rows fit
    train_step = make_train_step(
        student=student.config,
        teacher=teacher.config if teacher else None,
        objective=experiment.make_objective(config.objective),
        optimizer=optimizer,
        placement=placement_of(state),
        micro_batches=config.train.micro_batches,
        batch_rows=None if players else config.rollout.batch,
        dtype=jnp.dtype(config.compute_dtype),
        query_chunk=config.train.query_chunk,
        loss_chunk=config.train.loss_chunk,
        remat=config.train.remat,
        lora=experiment.make_lora(config.lora),
    )
    teacher_params = teacher.params if teacher else None
    base = student.params if config.lora.rank else None

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        state, raw = train_step(state, teacher_params, shard_batch(batch), base)
        return state, jax.device_get(raw)

    return update


def _train(
    config: FrozenConfigDict,
    state: TrainState,
    source: Source,
    update: _Update,
    checkpoints: Checkpoints,
    workdir: Path,
    stop: "_Stop",
    *,
    write: bool,
) -> TrainState:
    """The updates up to `train.updates`, each written down; closes `source` and `checkpoints`."""
    done = int(state.step)
    resume_step = done if done else None
    lines = JsonlWriter(workdir / "metrics.jsonl", resume_step=resume_step, write=write)
    events = EventWriter(workdir / "events", resume_step=resume_step, write=write)
    unmeasured = _unmeasured(config)
    with closing(source), closing(checkpoints), closing(lines), closing(events):
        while done < config.train.updates:
            clock = Stopwatch()
            experience = _draw(source, state, clock)
            with clock.measure("update"):
                state, raw = update(state, experience.batch)
            done += 1
            metrics = update_metrics(raw, experience.metrics, clock)
            metrics = {name: value for name, value in metrics.items() if name not in unmeasured}
            lines.write(done, metrics)
            events.write(done, metrics)
            _check_finite(done, raw, workdir)
            processes.say(_progress(done, config.train.updates, metrics))
            stopping = stop.anywhere()  # read once: the signal may come at any moment
            if done % config.checkpoint.every == 0 or done == config.train.updates or stopping:
                checkpoints.save(done, state, {"cursor": source.cursor})
            if stopping:
                checkpoints.wait()
                processes.say(f"stopped by SIGTERM; update {done} is saved in {workdir}")
                raise SystemExit(0)
    return state


def _start(
    config: FrozenConfigDict,
    untrained: Params,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
) -> tuple[TrainState, dict[str, Any]]:
    """The state to go on from: the newest checkpoint, or the beginning."""
    restored = checkpoints.restore_latest(abstract_state(untrained, optimizer))
    if restored is None:
        return init_state(untrained, optimizer, seed=config.seed), {"cursor": [0, 0]}
    _, state, meta = restored
    return state, meta


def _store_config(config: FrozenConfigDict, workdir: Path) -> None:
    path = workdir / "config.json"
    if processes.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists() and cfg.differences(
            cfg.read_stored(path), config, ignore=_free_fields(config)
        ):
            # Corrected before anything was trained: what was evaluated was something else.
            (workdir / "summary.json").unlink(missing_ok=True)
        # Renamed when whole: half a file left by a kill would refuse every continuation.
        partial = path.with_name("config.json.tmp")
        partial.write_text(cfg.to_json(config), encoding="utf-8")
        partial.replace(path)


def _evaluate_others(
    config: FrozenConfigDict,
    student: LoadedModel,
    untrained: Params,
    teacher: LoadedModel | None,
    workdir: Path,
    stop: "_Stop",
    *,
    write: bool,
) -> dict[str, Any]:
    """Everyone but the trained student: before, teacher, expert, random; once a workdir."""
    # Read by one process: others might find what it has written meanwhile, and take another path.
    stored = read_summary(workdir / "summary.json") if processes.is_first() else {}
    results = processes.first(stored.get("eval", {}))

    def player(who: str) -> LoadedModel | None:
        if who != "before":
            return teacher if who == "teacher" else None
        sampling = experiment.make_sampling_params(untrained, student, config)
        return dataclasses.replace(student, params=sampling)

    for who in config.eval.who:
        if is_evaluated(results.get(who), config, update=0):
            continue
        if model := player(who):
            results[who] = evaluate_model(
                config,
                model,
                model.params,
                update=0,
                judging=teacher,
                after_split=stop.end_if_set,
            )
        else:
            results[who] = evaluate_player(config, who, after_split=stop.end_if_set)
        write_summary(workdir / "summary.json", {"eval": {who: results[who]}}, write=write)
        shares = ", ".join(f"{s} {r['success']:.1%}" for s, r in results[who].items())
        processes.say(f"{who}: success {shares}")
        stop.end_if_set()
    return results


def _unmeasured(config: FrozenConfigDict) -> set[str]:
    """Metrics that this config's updates do not compute: left out, since they are not zero."""
    objective, names = config.objective, set()
    if not objective.confidence:
        names |= {"confidence", "by_turn/confidence"}
    if objective.divergence == "cross_entropy":
        names |= {"teacher_entropy"}
    if objective.scope == "trajectory":  # each trajectory has a Z of its own
        names |= {"z", "raw_weight", "by_turn/raw_weight"}
    if config.data.source != "on_policy":  # the tokens are not the student's samples
        names |= {"logprob_error"}
    return names


def _draw(source: Source, state: TrainState, clock: Stopwatch) -> Experience:
    try:
        return source.draw(state, clock)
    except ValueError as error:
        raise ValueError(f"update {int(state.step) + 1}: {error}") from error


def _check_finite(step: int, raw: Mapping[str, Any], workdir: Path) -> None:
    for name in ("loss", "grad_norm", "update_norm"):
        if not np.isfinite(raw[name]):
            raise ValueError(
                f"`{name}` is {raw[name]} at update {step}: nothing was saved from it, the last "
                f"checkpoint in {workdir / 'checkpoints'} is good; lower "
                "`optimizer.learning_rate`, or look at the update's line in metrics.jsonl"
            )


def update_metrics(
    raw: Mapping[str, Any], drawn: Mapping[str, Any], clock: Stopwatch
) -> dict[str, Any]:
    """One update's line of `metrics.jsonl`.

    Args:
      raw: what the train step returned, on the host.
      drawn: what the source returned, (sum, count) or scalars.
      clock: where the time went.
    """
    sums = raw["sums"]
    line = means(
        {
            **drawn,
            "divergence": (sums.divergence.sum(), sums.tokens),
            "raw_weight": (sums.weight, sums.tokens),
            "active_tokens": (sums.active, sums.tokens),
            "confidence": (sums.confidence.sum(), sums.turns.sum()),
            "student_entropy": (sums.student_entropy, sums.tokens),
            "teacher_entropy": (sums.teacher_entropy, sums.tokens),
            "tokens/student": sums.tokens,
            "by_turn/divergence": (sums.divergence, sums.tokens_by_turn),
            "by_turn/raw_weight": (sums.weight_by_turn, sums.tokens_by_turn),
            "by_turn/confidence": (sums.confidence, sums.turns),
            "by_turn/turns": (sums.turns, np.ones_like(sums.turns)),
            **{name: raw[name] for name in ("loss", "z", "grad_norm", "update_norm")},
            "logprob_error": sums.logprob_error,
            **{f"seconds/{part}": seconds for part, seconds in clock.seconds.items()},
            "seconds/compile": clock.compile_s,
        }
    )
    for part, tokens in (("rollout", "tokens/sampled"), ("update", "tokens/sequence")):
        count, seconds = line.get(tokens), clock.seconds.get(part)
        if isinstance(count, float) and seconds:
            line[f"tokens_per_s/{part}"] = count / seconds
    return line


def _progress(step: int, total: int, metrics: Mapping[str, Any]) -> str:
    shares = {
        name: metrics[f"verdict/{name}"]
        for name in VERDICT_NAMES.values()
        if f"verdict/{name}" in metrics
    }
    return progress_line(
        step=step,
        total_steps=total,
        loss=metrics["loss"],
        success=metrics.get("batch/success"),
        verdicts=shares,
        tokens_per_s=metrics.get("tokens_per_s/update"),
        seconds_per_step=sum(
            seconds
            for name, seconds in metrics.items()
            if name.startswith("seconds/") and name != "seconds/compile"
        ),
    )


class _Stop:
    """Whether SIGTERM came: a preempted machine gives notice before it goes."""

    is_set = False

    def anywhere(self) -> bool:
        """Whether it came to any process of the run."""
        return any(processes.gather(self.is_set))

    def end_if_set(self) -> None:
        """Ends the command where it came during an evaluation, of which nothing is lost but that.

        Raises:
          SystemExit: with status 0.
        """
        if self.anywhere():
            processes.say("stopped by SIGTERM; started again, the run goes on with its evaluation")
            raise SystemExit(0)


def _stop_on_sigterm() -> _Stop:
    # A new flag each run is safe: a run that saw the signal ends the process.
    stop = _Stop()

    def on_signal(signum: int, frame: object) -> None:
        stop.is_set = True

    signal.signal(signal.SIGTERM, on_signal)
    return stop


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.train`."""
    try:
        config, workdir, _ = cfg.parse_command_line(argv, usage=__doc__)
        cfg.validate(config)
        processes.start()
        with processes.ending_together():
            if config.compare.methods:
                processes.say(compare(config, workdir, run=run))
            else:
                run(config, workdir)
    except ValueError as error:
        cfg.fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
