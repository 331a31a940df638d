"""Episodes as files of JSON lines, for people to look at and to learn from (docs/episodes.md)."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from opd_jax.agent.conversation import Actor, Conversation, Turn
from opd_jax.judge.labels import Judgement
from opd_jax.judge.prompt import LABELS
from opd_jax.learner.batch import Batch
from opd_jax.learner.objective import Seen
from opd_jax.losses import Verdict
from opd_jax.runtime.exits import reading
from opd_jax.runtime.fields import FIGURES, affects, check_within
from opd_jax.runtime.files import remove_temporaries, replace_text

# In a workdir.
FOLDER = "episodes"
# How many of the teacher's tokens are told at each place, if they are asked for.
TOP = 5
_DIGITS = 5
_MAKES_A_FILE = (
    "python -m opd_jax.evaluate --workdir=DIR --policy=teacher --episodes=400 "
    "--config.eval.splits=train --config.eval.tasks=400"
)

Episode = dict[str, Any]  # a line
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class EpisodeSettings:
    """Which episodes of training are written.

    Attributes:
      every: updates between two files, the first of update 1; 0: none.
      count: most episodes of a file, the first of the batch.
      top: also tell the teacher's most likely tokens at each place.
    """

    every: int = field(metadata=affects(FIGURES))
    count: int = field(metadata=affects(FIGURES))
    top: bool = field(metadata=affects(FIGURES))

    def __post_init__(self):
        check_within(0, every=self.every)
        check_within(1, count=self.count)


# --- From conversations to lines ------------------------------------------------------------------


class Scored(NamedTuple):
    """What tells of the tokens in a batch.

    Attributes:
      look: from numbers of rows to what is told of them.
      batch: the batch.
      episode: number of the episode that each row is of.
    """

    look: Callable[[Sequence[int]], Seen]
    batch: Batch
    episode: Sequence[int]


def told(
    episodes: Mapping[int, Conversation],
    *,
    who: str,
    update: int,
    actor: str,
    decode: Decode,
    judgement: Judgement | None,
    scored: Scored | None,
    asides: Callable[[Conversation], Sequence[str]] | None = None,
) -> list[Episode]:
    """The lines of some episodes, with their verdicts and scores where there are some.

    In a run of several processes all take part. The weights lack the scale of the batch (`scaled`).

    Args:
      episodes: their numbers in the judgement and the batch.
      who, update, actor, decode: see `episode`.
      judgement: of the whole batch.
      scored: of the whole batch.
      asides: what the teacher alone was told before each turn of an episode.
    """
    lines = {
        number: episode(c, who=who, update=update, actor=actor, decode=decode)
        for number, c in episodes.items()
    }
    for number, line in lines.items():
        said = asides(episodes[number]) if asides else ()
        for turn, aside in zip(line["turns"], said, strict=False):
            turn |= {"aside": aside} if aside else {}
    if judgement is not None:
        for number, line in lines.items():
            add_judgement(line, judgement, number)
    if scored is None:
        return list(lines.values())
    # Rows that fill up a batch have no token.
    filled = np.asarray(scored.batch.response) < np.shape(scored.batch.tokens)[1]
    rows = [row for row, number in enumerate(scored.episode) if number in lines and filled[row, 0]]
    seen = scored.look(rows) if rows else None
    for number, line in lines.items():
        own = [at for at, row in enumerate(rows) if scored.episode[row] == number]
        if seen is not None and own:
            of_episode = jax.tree.map(itemgetter(own), seen)
            add_scores(line, of_episode, filled[[rows[at] for at in own]], decode)
    return list(lines.values())


def episode(
    conversation: Conversation, *, who: str, update: int, actor: str, decode: Decode
) -> Episode:
    """What was said and done in an episode, and its tokens if it has some.

    Args:
      conversation: the episode.
      who: whose episode it is, such as "train", or "after" of an evaluation.
      update: updates that the player had had.
      actor: who played, "student" or "teacher"; the teacher may have taken turns, and others may
        be replayed.
      decode: the text of tokens.
    """
    c = conversation
    assert c.task is not None  # a row that only fills a batch is no episode
    line: Episode = {
        "messages": [message._asdict() for message in c.messages],
        "task": {"split": c.split, "index": c.index, "id": c.task.id, "kind": c.task.type},
        "who": who,
        "update": update,
        "end": c.end,
        "success": c.success,
        "score": _rounded(c.score),
        "measures": {name: _rounded(value) for name, value in c.measures.items()},
        "turns": [
            _turn(turn, _written_by(turn, given=c.is_given(k), player=actor))
            for k, turn in enumerate(c.turns)
        ],
    }
    if c.tokens:
        logprobs = [_rounded(x) for x in c.logprobs]
        line["tokens"] = {"id": c.tokens, "turn": c.turn_id, "sampled_logprob": logprobs}
    spans = [range(*span) for k, span in enumerate(c.spans) if not c.is_given(k)]
    if spans:
        texts = [pieces(c.tokens[span.start : span.stop], decode) for span in spans]
        line["student_tokens"] = {
            "position": [position for span in spans for position in span],
            "text": [piece for text in texts for piece in text],
        }
    return line


def _written_by(turn: Turn, *, given: bool, player: str) -> str:
    if turn.actor is Actor.TEACHER:
        return "teacher"
    return "replay" if given else player


def _turn(turn: Turn, actor: str) -> dict[str, Any]:
    line: dict[str, Any] = {
        "actor": actor,
        "action": turn.action,
        "failure": turn.failure,
        "stop": turn.stop,
        "label": turn.oracle,
    }
    if turn.record:
        line["record"] = {name: list(texts) for name, texts in turn.record.items()}
    return line


def add_judgement(line: Episode, judgement: Judgement, row: int) -> None:
    """Adds the verdicts on the turns of conversation number `row`, and the scores of the words."""
    for k, turn in enumerate(line["turns"]):
        if judgement.given[row, k]:
            turn["verdict"] = Verdict(int(judgement.verdict[row, k])).name
        if not np.isnan(scores := judgement.scores[row, k]).any():
            turn["judge"] = dict(zip(LABELS, map(_rounded, scores), strict=True))


def add_scores(line: Episode, seen: Seen, filled: np.ndarray, decode: Decode) -> None:
    """Adds what student and teacher say of the student's tokens.

    The weights still lack the scale of the batch (`scaled`).

    Args:
      line: an episode with a student's tokens.
      seen: of the rows that the episode has, in their order.
      filled: bool [rows, R], which slots hold a token.
      decode: the text of tokens.
    """

    def column(x: Any) -> list[Any]:
        return [_rounded(value) for value in np.asarray(x)[filled]]

    scores, choices = seen.scores, seen.choices
    line["student_tokens"] |= {
        "student_logprob": column(scores.student_logprob),
        "teacher_logprob": column(scores.teacher_logprob),
        "divergence": column(scores.divergence),
        **({} if seen.weight is None else {"weight": column(seen.weight)}),
        "agrees": np.asarray(choices.agrees)[filled].tolist(),
    }
    if choices.tokens.shape[-1]:
        best = [np.asarray(x)[filled] for x in choices[1:]]
        line["student_tokens"]["top"] = [
            [
                [decode([token]), _rounded(t), _rounded(s)]
                for token, t, s in zip(*place, strict=True)
            ]
            for place in zip(*(x.tolist() for x in best), strict=True)
        ]
    written = set(line["tokens"]["turn"])
    for k, turn in enumerate(line["turns"]):
        for name in ("intervention", "confidence"):
            if (of_turns := getattr(seen, name)) is not None and k in written:
                # A row knows the confidence in the turns that it holds; elsewhere it is 0.
                turn[name] = _rounded(np.max(of_turns[:, k]))
    if seen.z is not None:
        line["z"] = _rounded(seen.z[0])


def scaled(line: Episode, z: float) -> Episode:
    """The episode with the scale of its batch in its weights, unless it has one of its own."""
    tokens = line.get("student_tokens", {})
    if "weight" not in tokens or "z" in line:
        return line
    weight = [None if s is None else _rounded(z * s) for s in tokens["weight"]]
    return line | {"z": _rounded(z), "student_tokens": tokens | {"weight": weight}}


def pieces(tokens: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds to those before it; together they are the whole text.

    A token that ends within a character adds nothing; the one that completes it adds it. Tokens are
    decoded behind the ones before them, since some decoders write a first token otherwise.
    """
    result, start, read = [], 0, 0
    for end in range(1, len(tokens) + 1):
        before, after = decode(tokens[start:read]), decode(tokens[start:end])
        if after.endswith("\ufffd") and end < len(tokens):
            result.append("")
            continue
        result.append(after[len(before) :])
        start, read = read, end
    return result


def _rounded(value: Any) -> float | None:
    """Five significant digits; None for what JSON cannot hold."""
    number = float(value)
    return float(f"{number:.{_DIGITS}g}") if math.isfinite(number) else None


# --- Files ----------------------------------------------------------------------------------------


def write_episodes(path: Path, episodes: Sequence[Episode]) -> None:
    """Writes a file of episodes as a whole; its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(line, allow_nan=False) + "\n" for line in episodes]
    replace_text(path, "".join(lines))


def update_file(folder: Path, update: int) -> Path:
    """The file of the episodes that an update learnt from."""
    return folder / f"update-{update:06d}.jsonl"


def drop_later(folder: Path, done: int) -> None:
    """Removes the files of updates after `done`, which are done again, and what a kill left."""
    remove_temporaries(folder)
    for path in folder.glob("update-*.jsonl"):
        found = re.fullmatch(r"update-(\d+)\.jsonl", path.name)
        if found and int(found[1]) > done:
            path.unlink(missing_ok=True)


def read_episodes(path: Path) -> list[Episode]:
    """The episodes in a file; empty lines are passed over.

    Raises:
      ValueError: there is none, or a line is not an episode; names the file and the line.
      WorldFailed: the file cannot be read now.
    """
    try:
        with reading(path):
            text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"`{path}`, a file of episodes, does not exist. `{_MAKES_A_FILE}` writes the teacher's "
            "to DIR/episodes/teacher-train.jsonl (docs/rollouts.md)"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"`{path}` must be a file of episodes, JSON lines: {error}") from None
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(_checked(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"line {number} of `{path}` is not an episode: {error}; see docs/episodes.md"
            ) from None
    if not found:
        raise ValueError(f"`{path}` must hold an episode a line, but it is empty")
    return found


def _checked(line: Any) -> Episode:
    """A line of JSON, if its messages are a conversation."""
    messages = line.get("messages") if isinstance(line, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("expected an object with a list `messages`")
    for message in messages:
        known = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not known or message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(
                "expected messages with a `role`, system, user or assistant, and a `content`, a "
                f"text; got {message!r}"
            )
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken != [("user", "assistant")[n % 2] for n in range(len(spoken))]:
        raise ValueError(
            "expected messages of user and assistant in turn, after at most one of the system; got "
            + ", ".join(roles)
        )
    return line
