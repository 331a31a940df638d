"""The agent loop: a batch of conversations between a model and its environments.

Each row plays by itself. When its response ends, its environment answers while other rows go on
sampling; then it reads the answer and samples again. When its episode ends, it takes the next task.
Each token is recorded with its turn as soon as it is sampled. An environment that breaks ends only
its own episode.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.agent.agent import Agent
from opd_jax.agent.conversation import Actor, Conversation, open_conversation, record_turn
from opd_jax.agent.environments import Answers
from opd_jax.agent.generate import Sampled
from opd_jax.agent.guide import Draws, Guide
from opd_jax.agent.positions import Positions
from opd_jax.agent.session import Response, Session
from opd_jax.envs.base import Env, Observation
from opd_jax.envs.faults import Begun, act, begin
from opd_jax.losses import NO_TURN
from opd_jax.model import Params
from opd_jax.runtime import progress


def rollout(
    params: Params,
    keys: jax.Array,
    *,
    agent: Agent,
    envs: Sequence[Env | None],
    tasks: Sequence[tuple[str, int]],
    depth: int | Sequence[int],
    replay: Sequence[Sequence[Response]] | None = None,
    keep: bool = False,
    guide: Guide | None = None,
    cut_repeated_failure: bool = False,
    between: Callable[[], None] | None = None,
    positions: Positions | None = None,
) -> list[Conversation]:
    """Plays one episode of each task, as many at a time as there are environments.

    An episode depends only on the parameters, its task and its key. With as many rows it is equal
    to the bit, whatever the other rows hold and whenever it starts. With another number of rows its
    log-probabilities differ by rounding.

    Args:
      params: the player's; those of `generate.for_decoding` are not copied.
      keys: PRNG keys, one for each task (see `row_keys`). A key is folded with the turn, then with
        the position.
      envs: one environment a row; their number is the batch of every compiled program. None for a
        row whose environment lives in another process.
      tasks: (split, index), any number of them.
      depth: turns after which an episode ends with "depth"; 0: no limit but the environment's. One
        number for all, or one for each task. Replayed turns count.
      replay: responses with which each episode begins, as far as they fit the context
        (`beginning`). They are given to the environment and carry no loss; the player goes on
        behind them.
      keep: a row prefers the next episode of the task that it has just played, and keeps in its
        cache what both begin with. So far fewer tokens are read of replays that begin alike; but
        the rounding of such an episode depends on the one before it.
      guide: the teacher, if it takes turns of the episodes. Which ones depends on an episode's key
        and on what has happened in it. It reads and samples as the player does.
      cut_repeated_failure: an episode ends with "cut" at the first failed turn whose action is that
        of the turn before; replayed turns are spared.
      between: called before answers of environments are taken, in all processes; what it raises
        ends the rollout.
      positions: counts what is read and sampled.

    Returns:
      A finished `Conversation` for each task, in order. It is `broken` if the environment broke or
      the first prompt did not fit, and has no token if that happened before the first turn.

    Raises:
      ValueError: not one key for each task, or not one depth.
    """
    if keys.shape != (len(tasks),):
        raise ValueError(
            f"`keys`: expected one for each of {len(tasks)} tasks, got shape {keys.shape}"
        )
    positions = positions or Positions()
    sessions = _Sessions(params, keys, agent, guide, rows=len(envs), positions=positions)
    answers = Answers(envs, join_after=agent.decoding.join_after)
    depths = [depth] * len(tasks) if isinstance(depth, int) else depth
    waiting = deque(
        _Episode(
            agent,
            number,
            task,
            most,
            replay[number] if replay else (),
            learns_guide=guide is not None and guide.learnt,
            cut_repeated_failure=cut_repeated_failure,
        )
        for number, (task, most) in enumerate(zip(tasks, depths, strict=True))
    )
    episodes = list(waiting)
    playing: dict[int, _Episode] = {}

    def take_episode(row: int) -> None:
        """Gives a row its next episode; it stays idle if there is none."""
        if not waiting:
            return
        before = playing.get(row) if keep else None
        alike = (n for n, e in enumerate(waiting) if before and e.task == before.task)
        if (number := next(alike, None)) is None:
            number = 0
            sessions.clear(row)
        playing[row] = episode = waiting[number]
        del waiting[number]
        answers.ask(row, episode.reset)

    played = progress.begin("", total=len(tasks), unit="episodes")
    try:
        for row in range(len(envs)):
            take_episode(row)
        while sessions.live or answers:
            while rows := answers.due():
                if between:
                    between()
                for row, answer in answers.take(rows).items():
                    episode = playing[row]
                    episode.hear(answer)
                    if episode.conversation.end:
                        played.done += 1
                        take_episode(row)
                    elif episode.replays():
                        answers.ask(row, episode.step)
                    else:
                        sessions.begin(row, episode)
            launched = sessions.launch()
            answers.work()  # while the device samples
            answers.chunk += 1
            for row, response in sessions.collect(launched).items():
                playing[row].response = response
                answers.ask(row, playing[row].step)
    finally:
        progress.end(played)
        answers.close()
    return [episode.conversation for episode in episodes]


class _Sessions:
    """Those who sample: the student, and the teacher if it guides. A row samples with one of them.

    Each has a cache of its own, and reads there what the other has written.
    """

    def __init__(
        self, params: Params, keys: jax.Array, agent: Agent, guide: Guide | None, **how: Any
    ):
        self._agent, self._guide, self._draws = agent, guide, Draws(keys)
        self._of = {Actor.STUDENT: Session(params, keys, agent=agent, **how)}
        if guide:
            how |= dict(purpose="reading_by_teacher")
            self._of[Actor.TEACHER] = Session(guide.params, keys, agent=guide.agent, **how)

    @property
    def live(self) -> bool:
        """Whether a row samples."""
        return any(session.live for session in self._of.values())

    def clear(self, row: int) -> None:
        """Empties a row."""
        for session in self._of.values():
            session.cache.clear(row)

    def begin(self, row: int, episode: "_Episode") -> None:
        """Starts the next response of a row's episode, and says there who writes it."""
        episode.actor, number, turn = Actor.STUDENT, episode.number, episode.turn
        if guide := self._guide:
            draw = self._draws.of(number, turn)
            if guide.takes(episode.conversation.turns, draw=draw):
                episode.actor = Actor.TEACHER
        context = self._agent.context(episode.conversation)
        self._of[episode.actor].begin(row, context, key=number, turn=turn)

    def launch(self) -> dict[Actor, Sampled | None]:
        """Starts to sample a chunk for every row that samples, without waiting for it."""
        return {actor: session.launch() for actor, session in self._of.items()}

    def collect(self, launched: dict[Actor, Sampled | None]) -> dict[int, Response]:
        """Waits for a chunk; returns the responses that ended in it, by row."""
        ended: dict[int, Response] = {}
        for actor, session in self._of.items():
            ended |= session.collect(launched[actor])
        return ended


@dataclass
class _Episode:
    """The episode of one task.

    Attributes:
      number: of its task, and of its key.
      task: (split, index).
      depth: most turns; 0: no limit.
      replay: see `rollout`.
      learns_guide: the teacher's turns are learnt from.
      cut_repeated_failure: see `rollout`.
      conversation: what was said so far; its `end` is "" while it runs.
      observation: what the environment said last.
      response: what was sampled last; None before the first turn.
      turn: the one that is sampled next.
      actor: who writes it.
    """

    agent: Agent
    number: int
    task: tuple[str, int]
    depth: int
    replay: Sequence[Response]
    learns_guide: bool
    cut_repeated_failure: bool
    conversation: Conversation = field(default_factory=lambda: Conversation(task=None))
    observation: Observation | None = None
    response: Response | None = None
    turn: int = 0
    actor: Actor = Actor.STUDENT

    def reset(self, env: Env) -> Begun:
        """Asks the environment to begin."""
        return begin(env, *self.task)

    def step(self, env: Env) -> Observation:
        """Asks the environment to act on the last response."""
        return act(env, self._text())

    def _text(self) -> str:
        assert self.response is not None  # it is asked after a response
        return self.agent.text(self.response.tokens)

    def replays(self) -> bool:
        """Takes the next response if it is replayed, and there is room for it."""
        if self.turn >= len(self.replay):
            return False
        response = self.replay[self.turn]
        length = len(self.agent.context(self.conversation)) + len(response.tokens)
        if length >= self.agent.decoding.context_tokens:
            self.replay = ()
            return False
        self.response, self.actor = response, Actor.REPLAY
        return True

    def hear(self, answer: Any) -> None:
        """Takes the environment's answer to `reset` or `step` into the conversation."""
        if self.response is None:
            self._begin(answer)
        else:
            self._go_on(answer, self.response)

    def _begin(self, begun: Begun) -> None:
        self.observation = begun.observation
        agent = self.agent
        self.conversation = open_conversation(
            begun, *self.task, chat=agent.chat, context_tokens=agent.decoding.context_tokens
        )

    def _go_on(self, after: Observation, response: Response) -> None:
        conversation, before = self.conversation, self.observation
        assert before is not None  # the answer to `reset`
        learnt = self.actor is Actor.STUDENT or (self.actor is Actor.TEACHER and self.learns_guide)
        turn = self.turn if learnt else NO_TURN
        conversation.append_response(response.tokens, response.logprobs, turn)
        actor = self.actor
        record_turn(conversation, before, self._text(), response.stop, after, actor=actor)
        self.observation, self.turn = after, self.turn + 1
        if not conversation.end and self.turn == self.depth:
            conversation.end = "depth"
        if not conversation.end and self.cut_repeated_failure and actor is not Actor.REPLAY:
            conversation.end = "cut" if conversation.repeats_failure else ""
        if not conversation.end:
            self._append_answer(after, response.stop)

    def _append_answer(self, after: Observation, stop: str) -> None:
        """Appends what the environment said, unless the context is full."""
        agent, conversation = self.agent, self.conversation
        follow = agent.chat.follow(after.message, ended=stop == "stop_token")
        # One slot must remain to sample into. A conversation without one ends with this turn.
        if (
            stop == "context"
            or len(agent.context(conversation)) + len(follow) >= agent.decoding.context_tokens
        ):
            conversation.end = "context"
        else:
            conversation.append_given(follow)


def beginning(conversation: Conversation, *, turns: int) -> list[Response]:
    """The first `turns` responses of an episode, to be replayed."""
    return [
        Response(conversation.tokens[start:end], [0.0] * (end - start), turn.stop)
        for (start, end), turn in zip(
            conversation.spans[:turns], conversation.turns[:turns], strict=True
        )
    ]


def row_keys(rng: jax.Array, numbers: Sequence[int]) -> jax.Array:
    """A PRNG key for each number: `rng` folded with it."""
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.asarray(numbers, jnp.uint32))
