"""Where an update's tokens come from: the student, the teacher, the expert, or a mix of players.

A source's `draw` is a function of the training state and its cursor, so a resumed run draws what
the interrupted one would have drawn.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from opd_jax.agent import history
from opd_jax.agent.conversation import Conversation, Trajectory, check, pack
from opd_jax.agent.rollout import everywhere, rollout, row_keys
from opd_jax.config import build as experiment
from opd_jax.config.build import LoadedModel
from opd_jax.experience import environments
from opd_jax.experience.stream import Stream, judge_example
from opd_jax.judge import agreement
from opd_jax.judge.answer import LABELS
from opd_jax.judge.verdicts import Judgement, judge
from opd_jax.learner.batch import Batch, make_batch
from opd_jax.learner.train_state import TrainState
from opd_jax.losses import Verdict
from opd_jax.report.stopwatch import Stopwatch

VERDICT_NAMES = {verdict: verdict.name.lower() for verdict in Verdict}


@dataclass(frozen=True)
class Experience:
    """What one update learns from.

    Attributes:
      batch: arrays on the host.
      metrics: name to (sum, count) or scalar, as `metrics.means` takes them.
    """

    batch: Batch
    metrics: dict[str, Any]


class Source(Protocol):
    """Draws the experience of one update after another."""

    @property
    def cursor(self) -> list[int]:
        """Where the next draw starts; JSON-able."""
        ...

    def draw(self, state: TrainState, clock: Stopwatch) -> Experience:
        """The next update's experience; the parts of the time it takes are put on `clock`."""
        ...

    def close(self) -> None:
        """Ends what runs in the background."""
        ...


def make_source(
    config: FrozenConfigDict,
    *,
    student: LoadedModel,
    teacher: LoadedModel | None,
    cursor: Sequence[int],
) -> Source:
    """The source named by `data.source`: on_policy, teacher, expert or players.

    Args:
      config: of the run.
      student: who plays on-policy, and whose tokenizer and chat format the tokens have.
      teacher: who plays or judges where the config says so; None for nobody.
      cursor: where the first draw starts, as from `Source.cursor`; [0, 0] at the beginning.

    Raises:
      ValueError: the teacher is to play or to judge, and there is none.
    """
    if config.data.source == "players":
        return Players(config, student, cursor=list(cursor))
    player, judging = student, None
    if config.data.source == "teacher":
        player = _needed(teacher, "`data.source` = 'teacher'")
    if config.objective.intervention:
        judging = _needed(teacher, "`objective.intervention`")
    return Episodes(config, player=player, judging=judging, cursor=list(cursor))


def _needed(teacher: LoadedModel | None, why: str) -> LoadedModel:
    if teacher is None:
        raise ValueError(f"{why} needs a teacher, got None; name one in `teacher`")
    return teacher


class Episodes:
    """One episode of each of the next training tasks, judged if asked for.

    They are played by the student (on-policy), or off-policy by the teacher or by the
    environment's expert.

    Args:
      config: of the run.
      player: the student or the teacher, whoever plays; the student where the expert does.
      judging: the teacher; None for no judge.
      cursor: (number of the next task, 0).
    """

    def __init__(
        self,
        config: FrozenConfigDict,
        *,
        player: LoadedModel,
        judging: LoadedModel | None,
        cursor: list[int],
    ):
        self._config, self.cursor = config, cursor
        self._player = player
        self._agent = experiment.make_agent(player, config.rollout)
        self._envs = environments.make_envs(config.env, config.rollout.batch)
        self._judge: Callable[..., Judgement] | None = None
        if judging is not None:
            self._judge = partial(
                judge,
                judging.params,
                by=experiment.make_judge(judging, config.judge),
                max_turns=config.env.max_turns,
            )

    def draw(self, state: TrainState, clock: Stopwatch) -> Experience:
        """One episode of each of the next `rollout.batch` training tasks."""
        config = self._config
        with clock.measure("rollout"):
            conversations = self._play(state, self._next_tasks())
        if all(c.broken for c in conversations):
            raise ValueError(
                f"`env`: the environments of all {len(conversations)} episodes broke; the warnings "
                "above say how"
            )
        verdict = np.full((len(conversations), config.env.max_turns), Verdict.STRONG, np.int32)
        judged: dict[str, Any] = {}
        if self._judge is not None:
            with clock.measure("judge"):
                verdict, judged = _ask(
                    self._judge, conversations, settings=config.judge, step=int(state.step)
                )
        trajectory, episodes = self._pack(conversations)
        batch = make_batch(
            trajectory, verdict[episodes], response_multiple=config.train.response_multiple
        )
        return Experience(batch, episode_metrics(conversations, trajectory) | judged)

    def _next_tasks(self) -> list[tuple[str, int]]:
        """The next training tasks, each `rollout.per_task` times; moves the cursor."""
        config, start = self._config, self.cursor[0]
        split, times = config.data.split, config.rollout.per_task
        count = config.rollout.batch // times
        size = environments.panel(config.env, "data.split", split).size
        numbers = experiment.train_tasks(size, seed=config.seed, start=start, count=count)
        self.cursor = [start + count, 0]
        return [(split, number) for number in numbers for _ in range(times)]

    def _pack(self, conversations: list[Conversation]) -> tuple[Trajectory, list[int]]:
        """The episodes as arrays, and which of them each row is of.

        With part of the history an episode has several rows: their number is filled up to a
        multiple of the batch, which bounds the number of compiled programs.
        """
        config, agent = self._config, self._agent
        rows, episodes = history.rows(
            conversations,
            history_turns=agent.history_turns,
            left_out=agent.chat.left_out,
        )
        missing = -len(rows) % config.rollout.batch
        rows += [Conversation(task=None)] * missing
        trajectory = pack(
            rows, max_turns=config.env.max_turns, length_multiple=config.train.length_multiple
        )
        check(trajectory, vocab_size=agent.model.vocab_size)
        return trajectory, episodes + [0] * missing

    def _play(self, state: TrainState, tasks: list[tuple[str, int]]) -> list[Conversation]:
        config, source = self._config, self._config.data.source
        if source == "expert":
            demonstrate = experiment.make_expert(config, self._agent)
            return everywhere(lambda env, task: demonstrate(env, *task), self._envs, tasks)
        params = self._player.params
        if source == "on_policy":
            params = experiment.make_sampling_params(state.params, self._player, config)
        return rollout(
            params,
            row_keys(jax.random.fold_in(state.rng, state.step), range(len(tasks))),
            agent=self._agent,
            envs=self._envs,
            tasks=tasks,
            depth=depth_at(int(state.step), config.rollout),
        )

    def close(self) -> None:
        """Ends the environments' processes."""
        environments.close(self._envs)


def depth_at(update: int, settings: FrozenConfigDict) -> int:
    """How many turns episodes may have: k(n) = start + ⌊n / every⌋ in update n; 0 for no limit.

    Long episodes of an untrained student are mostly histories that a trained one never sees.

    Source: TCOD-F2B (arXiv 2604.24005), a baseline of arXiv 2606.19659, where every = 1.
    """
    if not settings.depth_start:
        return 0
    return settings.depth_start + update // settings.depth_every


def _ask(
    ask: Callable[..., Judgement],
    conversations: Sequence[Conversation],
    *,
    settings: FrozenConfigDict,
    step: int,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Verdicts and figures of them; every so many updates of the other decoding as well."""
    judgement = ask(conversations, decode=settings.decode)
    metrics = judge_metrics(judgement, conversations)
    if settings.agreement_every and step % settings.agreement_every == 0:
        other = "generate" if settings.decode == "constrained" else "constrained"
        second = ask(conversations, decode=other)
        answered = judgement.asked & ~judgement.unparsable & ~second.unparsable
        same = (second.verdict == judgement.verdict) & answered
        metrics["judge/decodings_agree"] = (same.sum(), answered.sum())
        metrics[f"judge/unparsable_{other}"] = (second.unparsable.sum(), second.asked.sum())
    return judgement.verdict, metrics


class Players:
    """Demonstrations by players, and judge examples: supervised data that builds a model."""

    def __init__(self, config: FrozenConfigDict, student: LoadedModel, *, cursor: list[int]):
        data = config.data
        asker = experiment.make_judge(student, config.judge)
        asking = [dataclasses.replace(asker, context=c) for c in data.judge_contexts]

        def make_example(number: int, conversation: Conversation, index: int) -> Conversation:
            # The labels take turns too: so each context gets every label.
            by = asking[number // len(LABELS) % len(asking)]
            prompt = [*by.prefix(conversation, index), *by.question(conversation, index)]
            label = conversation.turns[index].oracle
            answer = student.tokenizer.encode(label, add_special_tokens=False)
            return judge_example(prompt, [*answer, student.chat.stop_ids[0]])

        self._stream = Stream(
            make_episode=experiment.make_demonstrator(
                config, tokenizer=student.tokenizer, chat=student.chat
            ),
            make_example=make_example if data.judge_examples else None,
            seed=config.seed,
            window=data.window,
            judge_examples=data.judge_examples,
            tokens_per_batch=data.tokens_per_batch,
            length_multiple=config.train.length_multiple,
            rows_multiple=config.train.micro_batches * config.mesh.data * config.mesh.fsdp,
            max_turns=config.env.max_turns,
            cursor=(cursor[0], cursor[1]),
        )
        self._response_multiple = config.train.response_multiple

    @property
    def cursor(self) -> list[int]:
        """(window, batch) of the stream."""
        return list(self._stream.cursor)

    def draw(self, state: TrainState, clock: Stopwatch) -> Experience:
        """The stream's next batch."""
        trajectory = next(self._stream)
        verdict = np.full(trajectory.failed.shape, Verdict.STRONG, np.int32)
        batch = make_batch(trajectory, verdict, response_multiple=self._response_multiple)
        return Experience(batch, {"tokens/sequence": (trajectory.lengths.sum(), 1)})

    def close(self) -> None:
        """Ends the generating thread."""
        self._stream.close()


def episode_metrics(
    conversations: Sequence[Conversation], trajectory: Trajectory
) -> dict[str, Any]:
    """How the batch's episodes went, as (sum, count).

    Those whose environment broke are counted in `end/broken` and left out of everything else.

    Args:
      conversations: the batch's episodes.
      trajectory: the rows made of them, for the counts of tokens.
    """
    ends = Counter(c.end for c in conversations)
    played = [c for c in conversations if not c.broken]
    n = len(played)
    turns = [turn for c in played for turn in c.turns]
    stops = Counter(turn.stop for turn in turns)
    return {
        "batch/success": (sum(c.success for c in played), n),
        "batch/score": (sum(c.score for c in played), n),
        "batch/turns": (len(turns), n),
        "batch/repeated": (sum(c.repeated_actions for c in played), len(turns)),
        "batch/failed": (sum(bool(turn.failure) for turn in turns), len(turns)),
        **{
            f"end/{end}": (ends[end], len(conversations))
            for end in sorted({"success", "turn_limit", "context", *ends})
        },
        **{
            f"stop/{stop}": (stops[stop], len(turns))
            for stop in ("stop_token", "turn_budget", "context")
        },
        "tokens/sampled": ((trajectory.turn_id >= 0).sum(), 1),
        "tokens/sequence": (trajectory.lengths.sum(), 1),
    }


def judge_metrics(judgement: Judgement, conversations: Sequence[Conversation]) -> dict[str, Any]:
    """Shares of verdicts, over all turns and by turn index, and agreement with the oracle.

    `judge/precision` and `judge/recall` are those of `agreement`.

    Args:
      judgement: verdict, asked and unparsable, [B, K] each.
      conversations: the B episodes judged, with the environment's labels where it has any.

    Returns:
      Name to (sum, count) or to a scalar; arrays [K] under `by_turn/`.
    """
    K = judgement.verdict.shape[1]
    turns = [0 if c.broken else len(c.turns) for c in conversations]
    exists = np.arange(K) < np.array(turns)[:, None]
    metrics: dict[str, Any] = {
        "judge/asked": (judgement.asked.sum(), exists.sum()),
        "judge/unparsable": (judgement.unparsable.sum(), judgement.asked.sum()),
    }
    for verdict, name in VERDICT_NAMES.items():
        given = (judgement.verdict == verdict) & exists
        metrics[f"verdict/{name}"] = (given.sum(), exists.sum())
        metrics[f"by_turn/{name}"] = (given.sum(axis=0), exists.sum(axis=0))
    counts = agreement.confusion(judgement, conversations).sum(axis=0)
    if counts.any():
        metrics["judge/precision"] = agreement.precision(counts)
        metrics["judge/recall"] = agreement.recall(counts)
        # What the two are shares of, so that they can be pooled over updates.
        metrics["judge/corrected"] = agreement.precision(counts)[1]
        metrics["judge/wrong"] = agreement.recall(counts)[1]
        for row, label in enumerate(LABELS):
            metrics[f"judge/recall_{label.lower()}"] = (counts[row, row], counts[row].sum())
    return metrics
