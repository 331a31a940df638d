"""Plays splits with a model or a player and reports success, score and turns with intervals.

    python -m opd_jax.evaluate --workdir=runs/quickstart [--step=120|best] [--config.x.y=v]
    python -m opd_jax.evaluate --config=quickstart --workdir=runs/expert --policy=expert
    python -m opd_jax.evaluate --workdir=runs/a --config.eval.judge=true

Without `--config` the workdir's own config holds. With `--policy=model` the student of the newest
checkpoint plays, or that of `--step`; with `--untrained` the config's student before any update.
Figures of the newest checkpoint are called `after`, those of another `step-N`.
`--config.eval.judge=true` also measures how well the teacher's verdicts on the turns agree with the
environment's labels; only then, and with `--policy=teacher`, the teacher's folder is read. The
figures of a split are in `summary.json` as soon as it is played. `--episodes=N` writes the first N
episodes of each split to `episodes/`, with the scores of their tokens if the teacher is read
(docs/episodes.md). While a run trains in the workdir, nothing else writes there: wait, or export a
checkpoint and evaluate the folder in a workdir of its own.
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
from opd_jax.agent.environments import close, make_envs
from opd_jax.agent.rollout import rollout, row_keys
from opd_jax.config import build, check_same_run, parse_command_line
from opd_jax.config.models import LoadedModel, load_judge, load_student, load_teacher
from opd_jax.config.records import Keep, make_keep
from opd_jax.config.references import MODELS, find_step, named_sizes
from opd_jax.config.settings import EVALUATED, Settings, binds_an_evaluation, read_settings
from opd_jax.config.workdir import (
    check_checkpoint,
    check_may_hold_a_run,
    check_models,
    store_evaluation,
)
from opd_jax.envs.make import benchmark_splits, make_env
from opd_jax.envs.players import make_player
from opd_jax.experience.demonstrations import play_out
from opd_jax.experience.tasks import Panel, describe
from opd_jax.judge import agreement
from opd_jax.judge.labels import NO_LABEL, Judgement, env_labels
from opd_jax.judge.prompt import read_prompt
from opd_jax.judge.verdicts import check_some_fit, judge_turns
from opd_jax.learner.train_state import TrainState
from opd_jax.model import Params
from opd_jax.report.figures import macro_average, summarize
from opd_jax.report.log import UpdateLog
from opd_jax.report.tables import judge_table, results_table
from opd_jax.report.writers import read_summary, write_summary
from opd_jax.runtime import processes, progress
from opd_jax.runtime.checkpoint import BEST, Checkpoints, saved_steps
from opd_jax.runtime.exits import reported
from opd_jax.runtime.fields import check_within
from opd_jax.runtime.lease import held
from opd_jax.runtime.signals import signalled
from opd_jax.runtime.stop import Stop

# Key of the mean over a benchmark's splits (`envs.make.benchmark_splits`).
MACRO_AVERAGE = "macro_average"

Panels = Mapping[str, Panel]
Figures = dict[str, Any]  # by split


# --- Playing a panel --------------------------------------------------------------------------


def play_model(
    settings: Settings,
    agent: Agent,
    params: Params,
    split: str,
    *,
    tasks: int,
    between: Callable[[], None] | None = None,
) -> list[Conversation]:
    """A model's episodes of the first `tasks` tasks of a split, in order, `eval.batch` at a time.

    Each episode is sampled with the key of `eval.seed` folded with its task's index, so it does not
    depend on `tasks`. For `between` see `rollout`.

    Raises:
      ValueError: the environment's errors.
    """
    keys = row_keys(jax.random.key(settings.eval.seed), range(tasks))
    panel = [(split, index) for index in range(tasks)]
    envs = make_envs(partial(make_env, settings.env), settings.eval.batch)
    try:
        return rollout(params, keys, agent=agent, envs=envs, tasks=panel, depth=0, between=between)
    finally:
        close(envs)


def play_player(settings: Settings, who: str, split: str, *, tasks: int) -> list[Conversation]:
    """A player's episodes of the tasks that `play_model` plays, without tokens.

    Raises:
      Stopped: a signal came to one of the processes (`runtime.stop`).
      ValueError: the environment has no such player, or an error of its own.
    """
    player = make_player(who, settings.env, field="--policy` or `eval.who", habits={})
    env = make_env(settings.env)
    try:
        own = [index for index in range(tasks) if processes.owns(index, tasks)]
        played = {}
        with progress.doing("", total=len(own), unit="episodes") as counted:
            for index in own:
                if signalled():
                    break
                rng = random.Random(f"{who}/{split}/{index}")
                played[index] = play_out(
                    env, split, index, player=player, rng=rng, stopping=signalled
                )
                counted.done += 1
    finally:
        close([env])
    return processes.share(signalled() or played, tasks)


# --- Figures of a model or a player -------------------------------------------------------------


def evaluate_model(
    settings: Settings,
    model: LoadedModel,
    params: Params,
    *,
    panels: Panels,
    update: int,
    judging: LoadedModel | None,
    known: Figures | None = None,
    after_split: Callable[[Figures], None] | None = None,
    between: Callable[[], None] | None = None,
    keep: Keep | None = None,
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
      known: earlier figures; a split is not played again where they hold (`is_evaluated`).
      after_split: gets the figures so far after each split that was played.
      between: called between turns, batches of questions and splits, in all processes; what it
        raises ends the evaluation.
      keep: gets the episodes of each split that was played.

    Raises:
      ValueError: the environment has no labels for `eval.judge`, or no episode of a split fits its
        context.
      WorldFailed: all episodes of a split broke.
    """
    agent = build.make_agent(model, settings, temperature=settings.eval.temperature)
    play = partial(play_model, settings, agent, params, between=between)
    made_with = _played_with(settings, update)
    judge = partial(measure_judge, settings, judging, between=between) if judging else None
    how: dict[str, Any] = dict(known=known, after_split=after_split, between=between, keep=keep)
    return _evaluate(settings, play, panels, made_with, judge, **how)


def evaluate_player(
    settings: Settings,
    who: str,
    *,
    panels: Panels,
    known: Figures | None = None,
    after_split: Callable[[Figures], None] | None = None,
    between: Callable[[], None] | None = None,
    keep: Keep | None = None,
) -> Figures:
    """A player's figures on every split of `eval.splits`; see `evaluate_model`."""
    play = partial(play_player, settings, who)
    how: dict[str, Any] = dict(known=known, after_split=after_split, between=between, keep=keep)
    return _evaluate(settings, play, panels, {}, None, **how)


def _evaluate(
    settings: Settings,
    play: Callable[..., list[Conversation]],
    panels: Panels,
    made_with: Mapping[str, Any],
    judge: Callable[[Sequence[Conversation]], tuple[Mapping[str, Any], Judgement]] | None,
    *,
    known: Figures | None,
    after_split: Callable[[Figures], None] | None,
    between: Callable[[], None] | None,
    keep: Keep | None,
) -> Figures:
    """Plays every split whose figures are not known, and measures its episodes."""
    ask, stored, splits = between or (lambda: None), known or {}, _splits(settings, panels)
    results: Figures = {
        split: stored[split]
        for split in splits
        if _holds(stored.get(split) or {}, settings, panels[split], made_with)
    }
    for split in splits:
        if split in results:
            continue
        ask()
        with progress.doing(f"evaluation on {split}"):
            played = play(split, tasks=_tasks(settings, panels[split]))
            results[split] = summarize(played) | {"digest": panels[split].digest, **made_with}
            judgement = None
            if settings.eval.judge and judge:
                results[split]["judge"], judgement = judge(played)
        if keep:
            keep(split, played, judgement)
        if after_split:
            after_split(_with_average(settings, results))
    return _with_average(settings, {split: results[split] for split in splits})


def _with_average(settings: Settings, results: Figures) -> Figures:
    """Adds a benchmark's mean over its splits, None while some are missing."""
    splits = benchmark_splits(settings.env.by)
    if not splits:
        return dict(results)
    complete = results.keys() >= set(splits)
    average = macro_average([results[split] for split in splits]) if complete else None
    return results | {MACRO_AVERAGE: average}


def measure_judge(
    settings: Settings,
    judging: LoadedModel,
    conversations: Sequence[Conversation],
    *,
    between: Callable[[], None] | None = None,
) -> tuple[dict[str, object], Judgement]:
    """`agreement.figures` of a judge over the turns of episodes, with how it was asked.

    The second result are its verdicts. For `between` see `judge_turns`.

    Raises:
      ValueError: the environment has no oracle, or no question fits the teacher's positions.
    """
    labels = env_labels(conversations, max_turns=settings.env.max_turns)
    by = build.make_judge(judging, settings)
    judgement = judge_turns(judging.params, conversations, labels, by=by, between=between)
    check_some_fit(judgement)
    if judgement.asked.any() and (labels.oracle == NO_LABEL).all():
        raise ValueError(
            f"`eval.judge`: none of {judgement.asked.sum()} verdicts has a label of the "
            "environment's beside it; agreement can be measured only where the environment has an "
            "oracle"
        )
    figures = agreement.figures(agreement.confusion(judgement, labels.oracle))
    return figures | _judged_by(settings), judgement


def _judging(settings: Settings, teacher: LoadedModel | None) -> LoadedModel | None:
    """The model whose verdicts are measured; None if none are."""
    return load_judge(settings, teacher) if settings.eval.judge else None


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
    how = {name: getattr(settings.judge, name) for name in names}
    if settings.judge.prompt:
        how["prompt"] = read_prompt(settings.judge.prompt).fingerprint
    if settings.judge.model:
        how["model"] = settings.judge.model
    return how


def is_evaluated(
    result: Mapping[str, Any] | None, settings: Settings, *, panels: Panels, update: int
) -> bool:
    """Whether evaluating again would give the stored figures, `result` by split.

    `update` is how many updates the model has had; of no effect for players.
    """
    stored, made_with = result or {}, _played_with(settings, update)
    return all(
        _holds(stored.get(split) or {}, settings, panels[split], made_with)
        for split in _splits(settings, panels)
    )


def _holds(
    figures: Mapping[str, Any], settings: Settings, panel: Panel, made_with: Mapping[str, Any]
) -> bool:
    """Whether playing a split again would give these figures."""
    if figures.get("digest") != panel.digest:
        return False
    # Broken episodes count. Else episodes that always break would be played on every start.
    if figures["n"] + figures.get("broken", 0) != _tasks(settings, panel):
        return False
    if "update" not in figures:  # a player's
        return True
    judge = _judged_by(settings) if settings.eval.judge else {}
    return (
        made_with.items() <= figures.items() and judge.items() <= figures.get("judge", {}).items()
    )


# --- Evaluations of a training run --------------------------------------------------------------


def evaluate_others(
    settings: Settings,
    student: LoadedModel,
    untrained: Params,
    teacher: LoadedModel | None,
    *,
    panels: Panels,
    workdir: Path,
    between: Callable[[], None],
) -> dict[str, Figures]:
    """Evaluates everyone in `eval.who`, except on splits whose figures `summary.json` has.

    `untrained` is what is trained, before any update. The figures of a split are written as soon as
    they exist. For `between` see `evaluate_model`.
    """
    # One process reads for all: on another, the file could vanish meanwhile.
    stored = read_summary(workdir / "summary.json") if processes.is_first() else {}
    known_ones = (*EVALUATED, "after")  # and none of `dev`, nor of other checkpoints
    found = processes.first(stored.get("eval", {}))
    results = {who: figures for who, figures in found.items() if who in known_ones}
    judging = _judging(settings, teacher)
    for who in settings.eval.who:
        known = results.get(who)
        if is_evaluated(known, settings, panels=panels, update=0):
            continue
        how: dict[str, Any] = dict(
            panels=panels, known=known, after_split=partial(_write, workdir, who), between=between
        )
        of_model: Callable[..., Figures] = partial(
            evaluate_model, settings, update=0, judging=judging, **how
        )
        with progress.doing(who):
            if who == "before":
                params = build.make_sampling_params(untrained, student, settings)
                results[who] = of_model(student, params)
            elif who == "teacher" and teacher:
                results[who] = of_model(teacher, teacher.params)
            else:
                results[who] = evaluate_player(settings, who, **how)
        shares = ", ".join(f"{s} {r['success']:.1%}" for s, r in results[who].items() if r)
        processes.say(f"{who}: success {shares}")
        between()
    return results


def evaluate_trained(
    settings: Settings,
    student: LoadedModel,
    trained: Params,
    teacher: LoadedModel | None,
    *,
    panels: Panels,
    workdir: Path,
    update: int,
    known: Figures | None,
    between: Callable[[], None],
) -> Figures:
    """Evaluates the student after `update` updates, except on splits whose figures `known` has."""
    if known and is_evaluated(known, settings, panels=panels, update=update):
        return known
    return evaluate_model(
        settings,
        student,
        build.make_sampling_params(trained, student, settings),
        panels=panels,
        update=update,
        judging=_judging(settings, teacher),
        known=known,
        after_split=partial(_write, workdir, "after"),
        between=between,
    )


class Dev:
    """The student's figures on `eval.dev` while it trains, and the checkpoint that is best by them.

    They are in the log, so a resumed run knows those of earlier starts. Training reads none.

    Args:
      student: sizes, tokenizer and chat format; its own parameters only below adapters.
      log: gets the figures.
      checkpoints: keep what is best by `checkpoint.best`.
      between: as in `evaluate_model`.
    """

    def __init__(
        self,
        settings: Settings,
        student: LoadedModel,
        *,
        panels: Panels,
        workdir: Path,
        log: UpdateLog,
        checkpoints: Checkpoints,
        between: Callable[[], None],
    ):
        how, self._best_by = settings.eval, settings.checkpoint.best
        self._every, self._split, self._panels = how.every, how.dev, panels
        how = dataclasses.replace(how, splits=(how.dev,), dev="", tasks=how.dev_tasks, judge=False)
        self._settings = dataclasses.replace(settings, eval=how)
        self._student, self._workdir, self._between = student, workdir, between
        self._log, self._checkpoints = log, checkpoints
        kept = processes.first(saved_steps(checkpoints.directory))
        # An earlier start may have played other tasks, or kept no best.
        self._known = {
            update: figures
            for update, figures in (log.evaluated() if self._every else {}).items()
            if update in kept and self._holds(update, figures)
        }
        self._choose()

    def __call__(self, update: int, state: TrainState) -> bool:
        """Evaluates after every `eval.every` updates; whether this one is now the best."""
        if not self._every or not update or update % self._every:
            return False
        if update not in self._known:
            figures = evaluate_model(
                self._settings,
                self._student,
                build.make_sampling_params(state.params, self._student, self._settings),
                panels=self._panels,
                update=update,
                judging=None,
                between=self._between,
            )[self._split]
            self._known[update] = figures
            self._log.write_evaluation(update, figures)
            _write(self._workdir, "dev", {self._split: figures})
        return self._choose() == update

    def _holds(self, update: int, figures: Mapping[str, Any]) -> bool:
        found, panels = {self._split: figures}, self._panels
        return is_evaluated(found, self._settings, panels=panels, update=update)

    def _choose(self) -> int | None:
        """Keeps the best checkpoint, the first of equal ones, and names it in the summary."""
        by = self._best_by
        if not by or not self._known:
            return None
        sign = 1 if BEST[by] else -1
        best = max(self._known, key=lambda update: (sign * self._known[update][by], -update))
        if self._checkpoints.best != best:
            self._checkpoints.best = best
            named = {"step": best, "figure": by, "value": self._known[best][by]}
            write_summary(self._workdir / "summary.json", {"best": named})
        return best


def _write(workdir: Path, who: str, figures: Figures) -> None:
    write_summary(workdir / "summary.json", {"eval": {who: figures}})


# --- The command --------------------------------------------------------------------------------


PLAYERS = ("expert", "random")


def run(
    config: FrozenConfigDict,
    workdir: Path,
    policy: str,
    which: str = "newest",
    *,
    episodes: int = 0,
) -> dict[str, Figures]:
    """Evaluates one policy and merges its figures into `summary.json`, split by split.

    The first `episodes` of each split are written (`records.make_keep`).

    With the first figures a workdir gets the config and the models that they are of.

    Args:
      policy: "model" is the student of a checkpoint, "before" that before any update; or
        "teacher", or one of `PLAYERS`.
      which: the checkpoint (`find_step`) of the policy "model".

    Raises:
      ValueError: the workdir holds a run or an evaluation with another method or model, since one
        file would mix figures of both; a run is working in it; or it has no such checkpoint, with
        the policy "model"; or there is no teacher, with the policy "teacher".
    """
    settings, is_teacher = read_settings(config), policy == "teacher"
    if is_teacher and not settings.teacher:
        raise ValueError("`--policy=teacher`: `teacher` is empty; name one, `--config.teacher=DIR`")
    check_may_hold_a_run(workdir)
    check_same_run(config, workdir, binds=binds_an_evaluation(settings, teacher=is_teacher))
    models, step = {}, None
    if policy not in PLAYERS:
        named = MODELS if settings.eval.judge or is_teacher else ("student",)
        build.check_named(settings, named)
        build.check_shapes(settings, named)
        models = check_models(settings, workdir, named)
    who = policy
    if policy == "model":
        who, step = find_student(workdir, which)
    panels = build.eval_panels(settings)
    with held(workdir) as workdir, Stop() as stop:
        for split in _splits(settings, panels):
            processes.say(describe(split, panels[split]))

        def write(figures: Figures) -> None:
            store_evaluation(config, models, workdir)
            _write(workdir, who, figures)

        how: dict[str, Any] = dict(panels=panels, after_split=write, between=stop.check)
        keeping = partial(make_keep, settings, workdir, who, count=episodes)
        if policy in PLAYERS:
            keep = keeping() if episodes else None
            return {who: evaluate_player(settings, policy, **how, keep=keep)}
        mesh = build.open_mesh(settings)
        with jax.set_mesh(mesh):
            make = keeping if episodes else None
            if not is_teacher:
                return {who: _evaluate_student(settings, workdir, mesh, step, how, make)}
            teacher = load_teacher(settings, mesh)
            assert teacher is not None  # as checked before
            keep = make(student=teacher) if make else None
            how |= dict(update=0, judging=_judging(settings, teacher), keep=keep)
            return {who: evaluate_model(settings, teacher, teacher.params, **how)}


def find_student(workdir: Path, which: str) -> tuple[str, int]:
    """The name of a checkpoint's figures, and its update. `which` is that of `--step`.

    Raises:
      ValueError: the workdir has no such checkpoint.
    """
    check_checkpoint(workdir)
    step = find_step(workdir, which, name="--step")
    newest = find_step(workdir, "newest", name="--step")
    return ("after" if step == newest else f"step-{step}"), step


def restore_student(
    settings: Settings,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    step: int | None,
    *,
    needs_teacher: bool,
) -> tuple[LoadedModel, Params]:
    """The student before any update, and what is trained of it at a checkpoint; None: before any.

    Without `needs_teacher` nothing is read of the teacher, so it may be missing.
    """
    checkpoints = Checkpoints(workdir / "checkpoints", keep=settings.checkpoint.keep)
    vocab_size = None if needs_teacher else _vocab_size(settings, checkpoints, step)
    student = load_student(settings, mesh, vocab_size=vocab_size)
    params = build.initial_params(student, settings, mesh)
    if step is not None:
        params = checkpoints.restore(step, {"params": params}, partial=True)[0]["params"]
    return student, params


def _evaluate_student(
    settings: Settings,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    step: int | None,
    how: dict[str, Any],
    keeping: Callable[..., Keep] | None,
) -> Figures:
    """The student of the workdir's checkpoint `step`; None: before any update."""
    student, params = restore_student(
        settings, workdir, mesh, step, needs_teacher=settings.eval.judge
    )
    update, teacher = step or 0, None
    if settings.eval.judge and (keeping or not settings.judge_model):
        teacher = load_teacher(settings, mesh)  # to judge, or to score tokens
    sampling, keep = build.make_sampling_params(params, student, settings), None
    if keeping:
        keep = keeping(
            update=update, student=student, trained=params if teacher else None, teacher=teacher
        )
    # Free the parameters; only the sampling copy is needed, unless tokens are scored.
    student = dataclasses.replace(student, params={})
    del params
    how = dict(update=update, judging=_judging(settings, teacher), keep=keep) | how
    return evaluate_model(settings, student, sampling, **how)


def _vocab_size(settings: Settings, checkpoints: Checkpoints, step: int | None) -> int:
    """Rows of the student's vocabulary, without a look at the teacher."""
    own = named_sizes(settings, ["student"])["student"].vocab_size
    if step is None:
        return own
    # Padding that the teacher lacks was cut from what was trained, but not from below adapters.
    return checkpoints.shapes(step).get("params/embed", (own,))[0]


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.evaluate`."""
    with reported():
        policies = ("model", "teacher", *PLAYERS)
        own: dict[str, Any] = dict(policy=policies, step="newest", untrained=False, episodes=0)
        config, workdir, flags = parse_command_line(argv, usage=__doc__, or_stored=True, **own)
        read_settings(config)
        check_within(0, **{"--episodes": flags["episodes"]})
        policy, which = flags["policy"], flags["step"]
        if policy != "model" and (flags["untrained"] or which != "newest"):
            raise ValueError(
                "`--step` and `--untrained` are of the student: omit them, or `--policy`"
            )
        if flags["untrained"] and which != "newest":
            raise ValueError("`--untrained` is the student before any update: omit `--step`")
        policy = "before" if flags["untrained"] else policy
        processes.start()
        with processes.ending_together():
            results = run(config, workdir, policy, which, episodes=flags["episodes"])
        processes.say("\n\n".join(filter(None, (results_table(results), judge_table(results)))))


if __name__ == "__main__":
    main(sys.argv[1:])
