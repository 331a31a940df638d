"""Plays splits with a model or a player and reports success, score and turns with intervals.

    python -m opd_jax.evaluate --config=quickstart --workdir=DIR --policy=expert

With `--policy=model` the student of the workdir's newest checkpoint plays, or the config's
untrained student if there is no checkpoint. `--config.eval.judge=true` also measures how well the
teacher's verdicts on the turns agree with the environment's labels.
"""

import dataclasses
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from opd_jax.agent.agent import Agent
from opd_jax.agent.conversation import Conversation
from opd_jax.agent.rollout import close, make_envs, rollout, row_keys
from opd_jax.config import build, check_same_run, parse_command_line
from opd_jax.config.models import LoadedModel, load_student, load_teacher
from opd_jax.config.settings import Settings, binds_an_evaluation, read_settings
from opd_jax.config.workdir import check_models
from opd_jax.envs.make import benchmark_splits, make_env
from opd_jax.envs.players import make_player
from opd_jax.experience.demonstrations import play_out
from opd_jax.experience.tasks import Panel, describe
from opd_jax.judge import agreement
from opd_jax.judge.labels import env_labels
from opd_jax.judge.verdicts import check_some_fit, judge_turns
from opd_jax.model import Params
from opd_jax.report.figures import macro_average, summarize
from opd_jax.report.tables import judge_table, results_table
from opd_jax.report.writers import read_summary, write_summary
from opd_jax.runtime import processes
from opd_jax.runtime.checkpoint import Checkpoints
from opd_jax.runtime.exits import reported
from opd_jax.runtime.mesh import make_mesh

# Key of the mean over a benchmark's splits (`envs.make.benchmark_splits`).
MACRO_AVERAGE = "macro_average"

Panels = Mapping[str, Panel]
Figures = dict[str, Any]  # by split


# --- Playing a panel --------------------------------------------------------------------------


def play_model(
    settings: Settings, agent: Agent, params: Params, split: str, *, tasks: int
) -> list[Conversation]:
    """A model's episodes of the first `tasks` tasks of a split, in order, `eval.batch` at a time.

    Each episode is sampled with the key of `eval.seed` folded with its task's index. So it depends
    neither on `tasks` nor on the batch.

    Raises:
      ValueError: the environment's errors.
    """
    batch, rng = settings.eval.batch, jax.random.key(settings.eval.seed)
    envs = make_envs(partial(make_env, settings.env), batch)
    conversations: list[Conversation] = []
    try:
        for start in range(0, tasks, batch):
            panel = [(split, index) for index in range(start, min(start + batch, tasks))]
            keys = row_keys(rng, range(start, start + batch))
            conversations += rollout(params, keys, agent=agent, envs=envs, tasks=panel, depth=0)
    finally:
        close(envs)
    return conversations


def play_player(settings: Settings, who: str, split: str, *, tasks: int) -> list[Conversation]:
    """A player's episodes of the tasks that `play_model` plays, without tokens.

    Raises:
      ValueError: the environment has no such player, or an error of its own.
    """
    player = make_player(who, settings.env, field="--policy` or `eval.who", habits={})
    env = make_env(settings.env)
    try:
        played = {
            index: play_out(
                env, split, index, player=player, rng=random.Random(f"{who}/{split}/{index}")
            )
            for index in range(tasks)
            if processes.owns(index, tasks)
        }
    finally:
        close([env])
    return processes.share(played, tasks)


# --- Figures of a model or a player -------------------------------------------------------------


def evaluate_model(
    settings: Settings,
    model: LoadedModel,
    params: Params,
    *,
    panels: Panels,
    update: int,
    judging: LoadedModel | None,
    after_split: Callable[[], None] | None = None,
) -> Figures:
    """A model's figures (`summarize`) on every split of `eval.splits`.

    The figures also hold what they depend on: the `digest` of the split's tasks, `update`,
    `temperature` and `seed`. With `eval.judge` they hold `judge`: how well the verdicts of
    `judging` on the played turns agree with the environment's labels (`agreement.figures`). Beside
    a benchmark's splits stands their `MACRO_AVERAGE`; None if some of them are missing.

    Args:
      model: sizes, tokenizer and chat format; its own `params` are not used.
      params: the parameters to play with.
      update: how many updates `params` have had.
      judging: the teacher, or None.
      after_split: called after each split, which takes minutes. An exception from it ends the
        evaluation.

    Raises:
      ValueError: the environment has no labels for `eval.judge`, or no episode of a split fits its
        context.
      WorldFailed: all episodes of a split broke.
    """
    agent = build.make_agent(model, settings, temperature=settings.eval.temperature)
    play = partial(play_model, settings, agent, params)
    return _evaluate(settings, play, panels, _played_with(settings, update), judging, after_split)


def evaluate_player(
    settings: Settings,
    who: str,
    *,
    panels: Panels,
    after_split: Callable[[], None] | None = None,
) -> Figures:
    """A player's figures on every split of `eval.splits`; see `evaluate_model`."""
    play = partial(play_player, settings, who)
    return _evaluate(settings, play, panels, {}, None, after_split)


def _evaluate(
    settings: Settings,
    play: Callable[..., list[Conversation]],
    panels: Panels,
    played_with: Mapping[str, Any],
    judging: LoadedModel | None,
    after_split: Callable[[], None] | None,
) -> Figures:
    """Plays every split and measures its episodes."""
    results: Figures = {}
    for split in _splits(settings, panels):
        played = play(split, tasks=_tasks(settings, panels[split]))
        results[split] = summarize(played) | {"digest": panels[split].digest, **played_with}
        if settings.eval.judge and judging is not None:
            results[split]["judge"] = measure_judge(settings, judging, played)
        if after_split:
            after_split()
    if splits := benchmark_splits(settings.env.by):
        complete = results.keys() >= set(splits)
        average = macro_average([results[split] for split in splits]) if complete else None
        results[MACRO_AVERAGE] = average
    return results


def measure_judge(
    settings: Settings, judging: LoadedModel, conversations: Sequence[Conversation]
) -> dict[str, object]:
    """`agreement.figures` of a judge over the turns of episodes, and how it was asked.

    Raises:
      ValueError: the environment has no oracle, or no question fits the teacher's positions.
    """
    labels = env_labels(conversations, max_turns=settings.env.max_turns)
    by = build.make_judge(judging, settings)
    judgement = judge_turns(judging.params, conversations, labels, by=by)
    check_some_fit(judgement)
    try:
        figures = agreement.figures(agreement.confusion(judgement, labels.oracle))
    except ValueError as error:
        raise ValueError(f"`eval.judge`: {error}") from None
    return figures | _judged_by(settings)


def _splits(settings: Settings, panels: Panels) -> list[str]:
    """The evaluated splits that have tasks here."""
    return [split for split in settings.eval.splits if split in panels]


def _tasks(settings: Settings, panel: Panel) -> int:
    """How many tasks of a split are played: `eval.tasks`, or all if there are fewer."""
    return min(settings.eval.tasks, panel.size)


def _played_with(settings: Settings, update: int) -> dict[str, Any]:
    """What a model's episodes depend on, besides the tasks."""
    how = settings.eval
    return {"update": update, "temperature": how.temperature, "seed": how.seed}


def _judged_by(settings: Settings) -> dict[str, Any]:
    """What a judge's figures depend on, besides the teacher and the turns."""
    names = ("context", "decode", "admissible_shown")
    return {name: getattr(settings.judge, name) for name in names}


def is_evaluated(
    result: Mapping[str, Any] | None, settings: Settings, *, panels: Panels, update: int
) -> bool:
    """Whether evaluating again would give the stored figures, `result` by split.

    `update` is how many updates the model has had; of no effect for players.
    """

    def good(figures: Mapping[str, Any], panel: Panel) -> bool:
        if figures.get("digest") != panel.digest:
            return False
        # Broken episodes count. Else episodes that always break would be played on every start.
        if figures["n"] + figures.get("broken", 0) != _tasks(settings, panel):
            return False
        if "update" not in figures:  # a player's
            return True
        judge = _judged_by(settings) if settings.eval.judge else {}
        return (
            _played_with(settings, update).items() <= figures.items()
            and judge.items() <= figures.get("judge", {}).items()
        )

    stored = result or {}
    splits = _splits(settings, panels)
    return all(good(stored.get(split) or {}, panels[split]) for split in splits)


# --- Evaluations of a training run --------------------------------------------------------------


def evaluate_others(
    settings: Settings,
    student: LoadedModel,
    untrained: Params,
    teacher: LoadedModel | None,
    *,
    panels: Panels,
    workdir: Path,
    after_split: Callable[[], None],
) -> dict[str, Figures]:
    """Evaluates everyone in `eval.who`, unless the workdir's `summary.json` has their figures.

    `untrained` is what is trained, before any update. Figures are written as soon as they exist.
    """
    # One process reads for all: on another, the file could vanish meanwhile.
    stored = read_summary(workdir / "summary.json") if processes.is_first() else {}
    results = processes.first(stored.get("eval", {}))
    play = partial(
        evaluate_model, settings, panels=panels, update=0, judging=teacher, after_split=after_split
    )
    for who in settings.eval.who:
        if is_evaluated(results.get(who), settings, panels=panels, update=0):
            continue
        if who == "before":
            results[who] = play(student, build.make_sampling_params(untrained, student, settings))
        elif who == "teacher" and teacher:
            results[who] = play(teacher, teacher.params)
        else:
            results[who] = evaluate_player(settings, who, panels=panels, after_split=after_split)
        write_summary(workdir / "summary.json", {"eval": {who: results[who]}})
        shares = ", ".join(f"{s} {r['success']:.1%}" for s, r in results[who].items() if r)
        processes.say(f"{who}: success {shares}")
        after_split()
    return results


def evaluate_trained(
    settings: Settings,
    student: LoadedModel,
    trained: Params,
    teacher: LoadedModel | None,
    *,
    panels: Panels,
    update: int,
    known: Figures | None,
    after_split: Callable[[], None],
) -> Figures:
    """Evaluates the student after `update` updates, unless `known` has these figures already."""
    if known and is_evaluated(known, settings, panels=panels, update=update):
        return known
    return evaluate_model(
        settings,
        student,
        build.make_sampling_params(trained, student, settings),
        panels=panels,
        update=update,
        judging=teacher,
        after_split=after_split,
    )


# --- The command --------------------------------------------------------------------------------


def run(config: FrozenConfigDict, workdir: Path, policy: str) -> dict[str, Figures]:
    """Evaluates one policy and merges its figures into `summary.json`.

    Raises:
      ValueError: the workdir holds a run with another method. One file would mix figures of two
        runs.
    """
    settings = read_settings(config)
    check_same_run(config, workdir, binds=binds_an_evaluation(settings))
    panels = build.eval_panels(settings)
    for split in _splits(settings, panels):
        processes.say(describe(split, panels[split]))
    if policy == "model":
        build.check_named(settings)
        check_models(settings, workdir)
        mesh = make_mesh(**dataclasses.asdict(settings.mesh))
        with jax.set_mesh(mesh):
            results = _evaluate_student(settings, workdir, mesh, panels)
    else:
        results = {policy: evaluate_player(settings, policy, panels=panels)}
    write_summary(workdir / "summary.json", {"eval": results})
    return results


def _evaluate_student(
    settings: Settings, workdir: Path, mesh: jax.sharding.Mesh, panels: Panels
) -> dict[str, Figures]:
    """The student `after` the workdir's newest checkpoint, or `before` any update."""
    student = load_student(settings, mesh)
    judging = load_teacher(settings, mesh) if settings.eval.judge else None
    checkpoints = Checkpoints(workdir / "checkpoints", keep=settings.checkpoint.keep)
    untrained = build.initial_params(student, settings, mesh)
    restored = checkpoints.restore_latest({"params": untrained}, partial=True)
    who = "after" if restored else "before"
    update, state, _ = restored or (0, {"params": untrained}, {})
    sampling = build.make_sampling_params(state["params"], student, settings)
    # Free the trained parameters; only the sampling copy is needed.
    student = dataclasses.replace(student, params={})
    del untrained, restored, state
    figures = evaluate_model(
        settings, student, sampling, panels=panels, update=update, judging=judging
    )
    return {who: figures}


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.evaluate`."""
    with reported():
        policies = ("model", "expert", "random")
        config, workdir, flags = parse_command_line(argv, usage=__doc__, policy=policies)
        read_settings(config)
        processes.start()
        with processes.ending_together():
            results = run(config, workdir, flags["policy"])
        processes.say("\n\n".join(filter(None, (results_table(results), judge_table(results)))))


if __name__ == "__main__":
    main(sys.argv[1:])
