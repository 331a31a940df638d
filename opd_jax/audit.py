"""Audits how reliable the teacher is at the student's turns, and what a method makes of that.

    python -m opd_jax.audit --workdir=runs/quickstart [--step=120|best]
    python -m opd_jax.audit --workdir=runs/a --config=quickstart --untrained --turns=200
    python -m opd_jax.audit --workdir=runs/quickstart --take_over=0,4,8,12

The student of the newest checkpoint, or of `--step`, plays the first `--episodes` (0: as many as an
evaluation) tasks of `--split` as in training: by default of `eval.dev` where `eval.every` is set,
since others are reported only once, else of the last of `eval.splits`. At `--turns` of its turns of
each label (0: all) the teacher takes `--samples` turns of its own, which are executed: how often
are they rejected, how often right, and how much of a method's weight lies where they are? And what
tells so without executing them: a rule over the record, the teacher's confidence, its entropy?
`--take_over` lets the teacher play on after so many turns of the student. The environment needs
nothing but to answer alike when an episode is played again. Figures are merged into `audit.json`
(docs/reliability.md).
"""

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from opd_jax.agent.conversation import Conversation, check_some_played
from opd_jax.agent.environments import close, make_envs
from opd_jax.agent.positions import Positions
from opd_jax.agent.rollout import row_keys
from opd_jax.config import build, check_same_run, parse_command_line
from opd_jax.config.models import LoadedModel, load_teacher
from opd_jax.config.records import make_look_at, score_episodes
from opd_jax.config.references import MODELS
from opd_jax.config.settings import Settings, binds_an_evaluation, read_settings
from opd_jax.config.workdir import check_may_hold_a_run, check_models, store_evaluation
from opd_jax.envs.make import judges_responses, keeps_record, make_env, own_rule
from opd_jax.evaluate import find_student, play_model, restore_student
from opd_jax.experience.tasks import Panel, describe
from opd_jax.judge.labels import NO_LABEL, EnvLabels, env_labels
from opd_jax.judge.others import oracle_judge, record_judge
from opd_jax.judge.own_turns import play_on
from opd_jax.judge.ranking import auc_figures
from opd_jax.judge.reliability import (
    Reliability,
    by_outcome,
    labels_by_rule,
    right,
    weight_on_reliable,
)
from opd_jax.judge.verdicts import Labeller
from opd_jax.learner.tokens import Tokens
from opd_jax.learner.weights import COMPARE_TURNS
from opd_jax.losses import NO_TURN
from opd_jax.model import Params
from opd_jax.report.intervals import wilson_interval
from opd_jax.report.tables import audit_tables
from opd_jax.report.writers import write_summary
from opd_jax.runtime import processes, progress
from opd_jax.runtime.exits import reported
from opd_jax.runtime.fields import check_within
from opd_jax.runtime.lease import held
from opd_jax.runtime.stop import Stop

Figures = dict[str, Any]


class How(NamedTuple):
    """What is audited, as the flags say.

    Attributes:
      split: whose tasks the student plays.
      episodes: how many.
      turns: most turns asked of each label; 0: all.
      samples: own turns of the teacher at each.
      take_over: turns of the student after which the teacher takes over.
    """

    split: str
    episodes: int
    turns: int
    samples: int
    take_over: tuple[int, ...]


def audit(
    settings: Settings,
    student: LoadedModel,
    trained: Params,
    teacher: LoadedModel,
    *,
    how: How,
    update: int,
    between: Callable[[], None],
) -> Figures:
    """The figures of an audit (docs/reliability.md).

    Args:
      settings: the run's.
      student: plays; its own parameters only below adapters.
      trained: what is trained of it.
      teacher: the teacher.
      how: what is asked.
      update: updates that the student has had.
      between: called between turns; what it raises ends the audit.
    """
    params = build.make_sampling_params(trained, student, settings)
    agent = build.make_agent(student, settings)
    with progress.doing("the student's episodes"):
        played = play_model(settings, agent, params, how.split, tasks=how.episodes, between=between)
    check_some_played(played)
    del params
    labels = env_labels(played, max_turns=settings.env.max_turns)
    tokens = read_tokens(settings, student, trained, teacher, played)
    verdicts = find_verdicts(settings, teacher, played, update=update, between=between)
    envs = make_envs(partial(make_env, settings.env), settings.eval.batch)
    try:
        measure = partial(
            build.make_reliability,
            *(settings, student, teacher, envs),
            samples=how.samples,
            per_label=how.turns,
            between=between,
        )
        with progress.doing("the teacher's own turns"):
            own, proxy = measure(labels="oracle")(played, update), None
        if judges_responses(settings.env.by):
            with progress.doing("the proxy"):
                proxy = measure(labels="record")(played, update)
        curve = {
            str(turns): take_over(
                settings, student, teacher, played, envs, turns=turns, between=between
            )
            for turns in how.take_over
        }
    finally:
        close(envs)
    weights = method_weights(settings, tokens, verdicts, labels, proxy)
    scores = proxy_scores(settings, tokens, played, own, proxy)
    return {
        "turns": turn_figures(own, proxy, labels, tokens, samples=how.samples),
        "weights": {
            name: {
                "tokens": _tokens_weighed(weight, tokens, labels),
                "reliable": weight_on_reliable(weight, own.share, labels),
            }
            for name, weight in weights.items()
        },
        "auc": auc_figures(own, labels, scores),
        "teacher_tokens": _cost(own),
        **({"proxy_tokens": _cost(proxy)} if proxy else {}),
        **({"take_over": curve} if curve else {}),
    }


def read_tokens(
    settings: Settings,
    student: LoadedModel,
    trained: Params,
    teacher: LoadedModel,
    played: Sequence[Conversation],
) -> Tokens:
    """What an update computes of the tokens of each turn, before a method weighs them."""
    weight = dataclasses.replace(settings.weight, by="uniform", options=())
    objective = dataclasses.replace(settings.objective, weight=weight, scope="batch")
    if not objective.needs_teacher:
        objective = dataclasses.replace(objective, divergence="reverse_kl")
    plain = dataclasses.replace(
        settings,
        weight=weight,
        objective=objective,
        episodes=dataclasses.replace(settings.episodes, top=False),
    )
    look_at = make_look_at(plain, student, teacher)
    assert look_at is not None  # the objective reads the teacher
    shape = len(played), settings.env.max_turns
    nothing = np.zeros(shape, np.int32)
    scored = score_episodes(plain, student, trained, look_at, played, nothing)
    batch = jax.tree.map(np.asarray, scored.batch)
    rows = np.flatnonzero((batch.response < batch.tokens.shape[1]).any(axis=1))
    response, there = batch.response[rows], rows[:, None]

    def taken(x: np.ndarray, fill: float) -> np.ndarray:
        return np.pad(x, [(0, 0), (0, 1)], constant_values=fill)[there, response]

    return Tokens(
        turn_id=taken(batch.turn_id, NO_TURN),
        sampled_logprobs=taken(batch.sampled_logprobs, 0.0),
        scores=scored.look(rows.tolist()).scores,
        episode=np.asarray(scored.episode)[rows],
        shape=shape,
    )


def find_verdicts(
    settings: Settings,
    teacher: LoadedModel,
    played: Sequence[Conversation],
    *,
    update: int,
    between: Callable[[], None],
) -> dict[str, np.ndarray]:
    """Verdicts on the turns, int32 [B, K], by the name of SAGE's weights with them.

    `sage` are those of the config's own judge, if its method takes verdicts; `oracle` the
    environment's labels, if there are any; `record` those of its rule, if it has one.
    """
    labels = env_labels(played, max_turns=settings.env.max_turns)
    label: dict[str, Labeller] = {}
    if settings.weight.takes("skip_weight"):
        weight = dataclasses.replace(settings.weight, by="intervention", options=())
        judge = dataclasses.replace(settings.judge, agreement_every=0)
        asked = dataclasses.replace(
            settings,
            judge=judge,
            weight=weight,
            objective=dataclasses.replace(settings.objective, weight=weight),
        )
        label["sage"] = build.make_labeller(asked, teacher, between=between)
    if (labels.oracle != NO_LABEL).any():
        label["oracle"] = oracle_judge(max_turns=settings.env.max_turns)
    if (rule := own_rule(settings.env.by)) and keeps_record(settings.env.by):
        label["record"] = record_judge(rule=rule, max_turns=settings.env.max_turns)
    with progress.doing("verdicts"):
        return {name: judge(played, update).verdict for name, judge in label.items()}


def method_weights(
    settings: Settings,
    tokens: Tokens,
    verdicts: Mapping[str, np.ndarray],
    labels: EnvLabels,
    proxy: Reliability | None,
) -> dict[str, np.ndarray]:
    """Weights of the turns, float [B, K], by method, before the scale; NaN where not known.

    `opd` weighs tokens alike, `NAME_fail_0` is NAME with failed turns at 0. Of `verdicts` the
    weights are those of SAGE, with confidence if the config's method reads it. The others are the
    methods of `learner.weights` that read no verdict, with the config's settings;
    `reliability_proxy` is known where the teacher was asked.
    """

    def by(name: str, **given: np.ndarray) -> np.ndarray:
        return tokens.weigh(dataclasses.replace(settings.weight, by=name, options=()), **given)

    judged = "sage" if settings.weight.reads_confidence else "intervention"
    weights = {"opd": by("uniform")}
    weights |= {name: by(judged, verdict=verdict) for name, verdict in verdicts.items()}
    weights = {
        f"{name}{end}": weight * ~(labels.failed & bool(end))
        for name, weight in weights.items()
        for end in ("", "_fail_0")
    }
    rows_are_episodes = not settings.rollout.history_turns
    for name in ("confidence", "entropy_aware", *(COMPARE_TURNS if rows_are_episodes else ())):
        weights[name] = by(name)
    if proxy:
        share = proxy.share
        weight = by("reliability", reliability=share)
        weights["reliability_proxy"] = np.where(np.isnan(share), np.nan, weight)
    return weights


def proxy_scores(
    settings: Settings,
    tokens: Tokens,
    played: Sequence[Conversation],
    own: Reliability,
    proxy: Reliability | None,
) -> dict[str, np.ndarray]:
    """What may tell where the teacher is right without executing its turns: higher is better.

    float [N, 1] of the turns asked. `rule` is [N, samples], the rule on the very turns that are
    executed, and `proxy` the share of other samples that the rule accepts. `confidence` and
    `entropy` are the teacher's means over the student's tokens.
    """
    scores = tokens.scores
    of_turns = {
        "confidence": tokens.mean(scores.teacher_top1_prob),
        "entropy": -tokens.mean(scores.teacher_entropy),
        "constant": np.zeros(tokens.shape),
    }
    found = {}
    if proxy and (rule := own_rule(settings.env.by)):
        there = [played[row] for row, _ in np.argwhere(own.asked)]
        found["rule"] = right(labels_by_rule(own.turns, there, rule=rule)).astype(float)
        of_turns = {"proxy": proxy.share, **of_turns}
    return found | {name: x[own.asked][:, None] for name, x in of_turns.items()}


def _tokens_weighed(weight: np.ndarray, tokens: Tokens, labels: EnvLabels) -> float | None:
    """The share of tokens that have a weight; None if that is not known of all."""
    if np.isnan(weight[labels.played]).any():
        return None
    return _share(tokens.count[weight > 0].sum(), tokens.count.sum())


def _cost(own: Reliability) -> dict[str, int]:
    """The teacher's tokens for its own turns."""
    return {name: int(own.metrics[f"reliability/{name}"][0]) for name in ("read", "sampled")}


def turn_figures(
    own: Reliability,
    proxy: Reliability | None,
    labels: EnvLabels,
    tokens: Tokens,
    *,
    samples: int,
) -> dict[str, Figures]:
    """What the teacher's own turns became, by the label of the student's turn there.

    Turns count as independent in intervals, the samples of one turn as one.
    """
    asked = {"failed": (own, "failed"), "right": (own, "right")}
    if proxy:
        asked["right_by_rule"] = proxy, "right"
    count, divergence = tokens.count, tokens.total(tokens.scores.divergence)
    figures: dict[str, Figures] = {}
    for name, there in by_outcome(labels).items():
        if not there.any():
            continue
        figures[name] = {
            "turns": int(there.sum()),
            "tokens": _share(count[there].sum(), count.sum()),
            "divergence": _share(divergence[there].sum(), divergence.sum()),
            "asked": int((own.asked & there).sum()),
        }
        for what, (of, said) in asked.items():
            part, whole = of.metrics[f"reliability/{said}_{name.lower()}"]
            figures[name] |= _rate(what, part / samples, whole / samples)
    return figures


def take_over(
    settings: Settings,
    student: LoadedModel,
    teacher: LoadedModel,
    played: Sequence[Conversation],
    envs: Sequence[Any],
    *,
    turns: int,
    between: Callable[[], None],
) -> Figures:
    """Success where the teacher plays on after `turns` turns of the student, to the end.

    It plays as in an evaluation, with the same keys: after 0 turns these are its own figures. An
    episode that has ended before is counted in `of_all` alone, as the student left it.
    """
    fit = {row: c for row, c in enumerate(played) if not c.broken}
    running = [row for row, c in fit.items() if len(c.turns) > turns]
    positions = Positions()
    with progress.doing(f"the teacher after {turns} turns"):
        ended = play_on(
            teacher.params,
            played,
            [(row, turns) for row in running],
            agent=build.teacher_there(
                student, teacher, settings, temperature=settings.eval.temperature
            ),
            envs=envs,
            keys=row_keys(jax.random.key(settings.eval.seed), running),
            turns=0,
            between=between,
            positions=positions,
        )
    whole = [c for c in ended if not c.broken]
    wins = sum(c.success for c in whole)
    before = sum(c.success for row, c in fit.items() if row not in running)
    return {
        "n": len(whole),
        **_rate("success", wins, len(whole)),
        **_rate("of_all", wins + before, len(whole) + len(fit) - len(running)),
        "read": positions.tokens("reading"),
        "sampled": positions.tokens("sampling"),
    }


def _rate(name: str, part: float, whole: float) -> Figures:
    n = round(whole)
    interval = list(wilson_interval(round(part), n))
    return {name: _share(part, whole), f"{name}_ci95": interval}


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


# --- The command --------------------------------------------------------------------------------


def run(config: FrozenConfigDict, workdir: Path, which: str, how: How) -> tuple[str, Figures]:
    """Audits a student, and merges the figures into `audit.json`; `which` is "" if untrained.

    Returns:
      The name of the student's figures, as in `summary.json`, and the figures.

    Raises:
      ValueError: there is no teacher, or as `evaluate.run`.
    """
    settings = read_settings(config)
    if not settings.teacher or settings.student == "new":
        raise ValueError("`teacher` is empty: an audit needs one, `--config.teacher=DIR`")
    default = settings.eval.dev if settings.eval.every else settings.eval.splits[-1]
    split = how.split or default
    most = settings.eval.dev_tasks if split == settings.eval.dev else settings.eval.tasks
    check_may_hold_a_run(workdir)
    check_same_run(config, workdir, binds=binds_an_evaluation(settings, teacher=True))
    build.check_named(settings)
    build.check_shapes(settings)
    models = check_models(settings, workdir, MODELS)
    who, step = find_student(workdir, which) if which else ("before", None)
    panel = _panel(settings, split)
    how = how._replace(split=split, episodes=min(how.episodes or most, panel.size))
    with held(workdir) as workdir, Stop() as stop:
        processes.say(describe(split, panel))
        mesh = build.open_mesh(settings)
        with jax.set_mesh(mesh):
            teacher = load_teacher(settings, mesh)
            assert teacher is not None  # as checked before
            student, trained = restore_student(settings, workdir, mesh, step, needs_teacher=True)
            figures = audit(
                *(settings, student, trained, teacher),
                how=how,
                update=step or 0,
                between=stop.check,
            )
        store_evaluation(config, models, workdir)
        figures = {
            "update": step or 0,
            "digest": panel.digest,
            "seed": settings.seed,
            "temperature": settings.rollout.temperature,
            **{name: value for name, value in how._asdict().items() if name != "take_over"},
            **figures,
        }
        write_summary(workdir / "audit.json", {who: {split: figures}})
    return who, figures


def _panel(settings: Settings, split: str) -> Panel:
    """The tasks of a split, which may be the one that chooses checkpoints."""
    alone = dataclasses.replace(settings.eval, splits=(split,), every=0)
    last = dataclasses.replace(settings.checkpoint, best="")
    return build.eval_panels(dataclasses.replace(settings, eval=alone, checkpoint=last))[split]


def turns_to_take_over(text: str, *, max_turns: int) -> tuple[int, ...]:
    """The turns that `--take_over=0,4,8` names; none for "".

    Raises:
      ValueError: they are no numbers of turns below `max_turns`.
    """
    turns = tuple(map(int, text.split(","))) if re.fullmatch(r"\d+(,\d+)*", text) else ()
    if text and (not turns or max(turns) >= max_turns):
        raise ValueError(
            "flag `--take_over` expects numbers of turns below `env.max_turns` = "
            f"{max_turns}, such as 0,4,8; got `{text}`"
        )
    return turns


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.audit`."""
    with reported():
        own: dict[str, Any] = dict(step="newest", untrained=False, split="", take_over="")
        own |= dict(episodes=0, turns=100, samples=1)
        config, workdir, flags = parse_command_line(argv, usage=__doc__, or_stored=True, **own)
        settings = read_settings(config)
        check_within(0, **{"--episodes": flags["episodes"], "--turns": flags["turns"]})
        check_within(1, **{"--samples": flags["samples"]})
        if flags["untrained"] and flags["step"] != "newest":
            raise ValueError("`--untrained` is the student before any update: omit `--step`")
        after = turns_to_take_over(flags["take_over"], max_turns=settings.env.max_turns)
        how = How(**{name: flags[name] for name in How._fields} | {"take_over": after})
        processes.start()
        with processes.ending_together():
            which = "" if flags["untrained"] else flags["step"]
            who, figures = run(config, workdir, which, how)
        processes.say(audit_tables(who, figures))


if __name__ == "__main__":
    main(sys.argv[1:])
