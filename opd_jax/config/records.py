"""What a run and an evaluation write: the log of updates, and episodes with what tokens score."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from opd_jax.agent import history
from opd_jax.agent.conversation import Conversation
from opd_jax.config import build
from opd_jax.config.models import LoadedModel
from opd_jax.config.settings import Settings
from opd_jax.experience.source import Played
from opd_jax.judge.labels import Judgement
from opd_jax.learner.batch import Batch
from opd_jax.learner.looking import make_look
from opd_jax.learner.nonfinite import Place, make_find
from opd_jax.learner.objective import Seen
from opd_jax.learner.optimizer import learning_rate
from opd_jax.learner.train_state import TrainState
from opd_jax.losses import NO_TURN
from opd_jax.model import Params
from opd_jax.report.episodes import FOLDER, TOP, Decode, Episode, Scored, told, write_episodes
from opd_jax.report.log import UpdateLog
from opd_jax.report.update import unmeasured
from opd_jax.runtime import processes

# Gets a split, its episodes, and what a judge said of them.
Keep = Callable[[str, Sequence[Conversation], Judgement | None], None]


def make_log(
    settings: Settings,
    student: LoadedModel,
    teacher: LoadedModel | None,
    workdir: Path,
    *,
    done: int,
    profile: Sequence[int],
) -> UpdateLog:
    """The log of a run that resumes after `done` updates and traces those of `profile`."""
    on_policy = settings.data.on_policy
    tell = make_tell(settings, student, teacher)
    return UpdateLog(
        workdir,
        done=done,
        updates=settings.train.updates,
        learning_rate=learning_rate(settings.optimizer, total_updates=settings.train.updates),
        leave_out=unmeasured(
            settings.objective,
            on_policy=on_policy,
            replays=settings.data.replays,
            teacher_plays=settings.rollout.teacher_plays,
        ),
        profile=profile,
        wandb=settings.wandb,
        episodes_every=settings.episodes.every,
        show=make_show(settings, tell),
        blame=make_blame(settings, student, teacher, tell) if settings.debug.nans else None,
    )


# Lines of some episodes that an update learns from, made before it takes the state.
Show = Callable[[TrainState, Batch, Played, Judgement | None], list[Episode]]
# The same of the episodes with these numbers.
Tell = Callable[[Iterable[int], TrainState, Batch, Played, Judgement | None], list[Episode]]


def make_show(settings: Settings, tell: Tell) -> Show:
    """The function that tells of the first episodes of a batch, of those that did not break."""

    def show(
        state: TrainState, batch: Batch, played: Played, judgement: Judgement | None
    ) -> list[Episode]:
        fit = [n for n, c in enumerate(played.conversations) if c.messages and not c.broken]
        return tell(fit[: settings.episodes.count], state, batch, played, judgement)

    return show


def make_tell(settings: Settings, student: LoadedModel, teacher: LoadedModel | None) -> Tell:
    """The function that tells of some episodes of a batch."""
    look_at = make_look_at(settings, student, teacher)
    asides = build.make_told(settings, student.chat)

    def tell(
        numbers: Iterable[int],
        state: TrainState,
        batch: Batch,
        played: Played,
        judgement: Judgement | None,
    ) -> list[Episode]:
        scored = None
        if look_at:
            scored = Scored(partial(look_at, state.params, batch), batch, played.episode)
        return told(
            {n: played.conversations[n] for n in numbers},
            who="train",
            update=int(state.step),
            actor="student" if settings.data.on_policy else "teacher",
            decode=student.tokenizer.decode,
            judgement=judgement,
            scored=scored,
            asides=asides,
        )

    return tell


def make_blame(
    settings: Settings, student: LoadedModel, teacher: LoadedModel | None, tell: Tell
) -> Callable[[TrainState, Batch, Played, Judgement | None], tuple[str, list[Episode]]]:
    """The function that says where an update stops being finite, and tells of those episodes."""
    scores = teacher if settings.objective.needs_teacher else None
    find = make_find(
        student=student.config,
        teacher=scores.config if scores else None,
        objective=settings.objective,
        lora=build.adapters(settings),
        dtype=jnp.dtype(settings.compute_dtype),
        query_chunk=settings.train.query_chunk,
        loss_chunk=settings.train.loss_chunk,
        remat=settings.train.remat,
    )
    base = student.params if build.adapters(settings) else None

    def blame(
        state: TrainState, batch: Batch, played: Played, judgement: Judgement | None
    ) -> tuple[str, list[Episode]]:
        judging = scores.params if scores else None
        places = find(state.params, base, judging, batch, settings.episodes.count)
        if not places:
            return "no row alone is to blame", []
        of = [played.episode[place.row] for place in places]
        told_of = dict.fromkeys(n for n in of if played.conversations[n].messages)
        where = in_words(places[0], batch, played.conversations[of[0]], student.tokenizer.decode)
        return where, tell(told_of, state, batch, played, judgement)

    return blame


def in_words(place: Place, batch: Batch, of: Conversation, decode: Decode) -> str:
    """Where a row stops being finite, and with what."""
    turns, (row, at, what) = np.asarray(batch.turn_id)[place.row], place
    said = f"row {row} (task {of.index} of {of.split}) stops being finite"
    if at < 0:
        return f"{said} before its first token: {what}"
    later = [int(turn) for turn in turns[at:] if turn != NO_TURN]
    turn = f"before turn {later[0]}" if later else "after its last turn"
    if turns[at] != NO_TURN:
        turn = f"in turn {later[0]}"
    text = decode([int(batch.tokens[row, at])])
    return f"{said} {turn} at token {at}, {text!r}: {what}"


# (trained, batch, some of its rows) to what is told of these rows.
LookAt = Callable[[Params, Batch, Sequence[int]], Seen]


def make_look_at(
    settings: Settings, student: LoadedModel, teacher: LoadedModel | None
) -> LookAt | None:
    """The function that looks at rows of a batch, from what is trained (`learner.looking`).

    None if the objective reads no teacher: then there is nothing to compare.
    """
    if teacher is None or not settings.objective.needs_teacher:
        return None
    look = make_look(
        student=student.config,
        teacher=teacher.config,
        objective=settings.objective,
        dtype=jnp.dtype(settings.compute_dtype),
        query_chunk=settings.train.query_chunk,
        loss_chunk=settings.train.loss_chunk,
        lora=build.adapters(settings),
        top=TOP if settings.episodes.top else 0,
    )
    base = student.params if build.adapters(settings) else None
    return lambda trained, batch, rows: look(trained, base, teacher.params, batch, rows)


def score_episodes(
    settings: Settings,
    student: LoadedModel,
    trained: Params,
    look_at: LookAt,
    played: Sequence[Conversation],
    verdict: np.ndarray,
) -> Scored:
    """What may be looked at in episodes outside training; `verdict` is int32 [B, K]."""
    rows_of = partial(
        history.rows,
        history_turns=settings.rollout.history_turns,
        left_out=student.chat.left_out,
    )
    rows, of = rows_of(played)
    retell, told = build.make_retell(settings, student.chat), None
    if retell:
        told, _ = rows_of([retell(c) for c in played])
    multiple = settings.train.length_multiple
    these = Played(list(played), rows, of, multiple, metrics={}, teacher_rows=told)
    labels = build.other_labels(settings, played)
    batch = build.make_pack(settings, student.config)(these, verdict, labels)
    look = partial(look_at, trained, batch)
    if "reliability" not in settings.weight.labels:
        return Scored(look, batch, of)
    # Nobody has asked how reliable the teacher is, so the weights are not known.
    return Scored(lambda rows: replace(look(rows), weight=None), batch, of)


def make_keep(
    settings: Settings,
    workdir: Path,
    who: str,
    *,
    count: int,
    update: int = 0,
    student: LoadedModel | None = None,
    trained: Params | None = None,
    teacher: LoadedModel | None = None,
) -> Keep:
    """The function that writes the first `count` episodes of a split (docs/episodes.md).

    Args:
      settings: the run's.
      workdir: where they are written, in a folder of their own.
      who: whose they are.
      count: how many of a split; at least 1.
      update: updates that the player had had.
      student: who played; None for a player without tokens.
      trained: what is trained of the student; None: no token has scores.
      teacher: scores the tokens, if there is one.
    """
    look_at = make_look_at(settings, student, teacher) if student and trained else None
    asides = build.make_told(settings, student.chat) if student and look_at else None

    def scored(played: list[Conversation], judgement: Judgement | None) -> Scored | None:
        if not (student and trained and look_at and judgement):
            return None
        return score_episodes(settings, student, trained, look_at, played, judgement.verdict)

    def keep(split: str, played: Sequence[Conversation], judgement: Judgement | None) -> None:
        first = list(played[:count])
        lines = told(
            {number: c for number, c in enumerate(first) if c.messages},
            who=who,
            update=update,
            actor="student",
            decode=student.tokenizer.decode if student else lambda tokens: "",
            judgement=judgement,
            scored=scored(first, judgement),
            asides=asides,
        )
        if processes.is_first():
            write_episodes(workdir / FOLDER / f"{who}-{split}.jsonl", lines)

    return keep
