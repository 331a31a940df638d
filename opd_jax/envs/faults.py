"""What goes wrong in an environment or its player ends its own episode.

It does so in the run's process as it does in a worker's.
"""

import logging
import math
import numbers
import os
import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from opd_jax.envs.base import BROKEN, Env, Observation, Task
from opd_jax.runtime.exits import WorldFailed


class Begun(NamedTuple):
    """An episode that was asked for.

    Attributes:
      observation: the first; `BROKEN` if `reset` failed.
      task: what is played; only its `id` is set if `reset` failed.
      system: the system message.
      refused: what `reset` said in a `ValueError`, else "". If it says so of every task, it is a
        mistake in the settings (`conversation.check_some_played`).
    """

    observation: Observation
    task: Task
    system: str
    refused: str = ""


def begin(env: Env, split: str, index: int) -> Begun:
    """Starts task `index` of `split`. Raises `WorldFailed` alone."""
    try:
        observation = answered(env, env.reset(split, index))
        told = [getattr(env.task, name, None) for name in ("id", "type", "goal", "scene")]
        if not all(isinstance(text, str) for text in (*told, env.system)):
            raise ValueError(f"expected texts, got the task {env.task!r} and {env.system!r}")
        return Begun(observation, env.task, env.system)
    except WorldFailed:
        raise
    except Exception as error:
        task = Task(id=f"{split}/{index}", type="", goal="", scene="")
        if isinstance(error, ValueError | ImportError):
            return Begun(broken("reset", str(error)), task, "", refused=str(error))
        return Begun(breaks("reset", task, error), task, "")


def act(env: Env, response: str) -> Observation:
    """Gives a response to the environment. Raises `WorldFailed` alone."""
    try:
        return answered(env, env.step(response))
    except WorldFailed:
        raise
    except Exception as error:
        return breaks("step", env.task, error)


def answered(env: Env, observation: Any) -> Observation:
    """An environment's answer, checked, with its record if it keeps one (`base.Records`)."""
    observation = checked(observation)
    if not hasattr(env, "record"):  # such as a `Worker`, whose process has been here
        return observation
    kept = env.record()
    if not isinstance(kept, Mapping):
        raise ValueError(f"`record()`: expected lists of texts by name, got {kept!r}")
    record = {name: tuple(texts) for name, texts in kept.items()}
    return checked(replace(observation, record=record))


def checked(observation: Any) -> Observation:
    """The observation, if its fields have their types.

    Raises:
      ValueError: they have not, or it is not an Observation.
    """
    if not isinstance(observation, Observation):
        raise ValueError(f"expected an Observation, got {observation!r}")
    listed = observation.admissible
    if not isinstance(listed, (tuple, list)):
        raise ValueError(f"`admissible`: expected commands, got {listed!r}")
    names = ("text", "message", "end", "action", "failure", "oracle")
    texts = [(name, getattr(observation, name)) for name in names]
    texts += [("admissible", command) for command in listed]
    texts += [("measures", name) for name in observation.measures]
    texts += [("record", text) for part in observation.record.values() for text in part]
    for name, text in texts:
        if not isinstance(text, str):
            raise ValueError(f"`{name}`: expected a text, got {text!r}")
    if observation.oracle not in ("", "SKIP", "WEAK", "STRONG"):
        raise ValueError(f"`oracle`: expected SKIP, WEAK or STRONG, got {observation.oracle!r}")
    for name, number in {"score": observation.score, **observation.measures}.items():
        if not isinstance(number, numbers.Real) or not math.isfinite(number):
            raise ValueError(f"`{name}`: expected a finite number, got {number!r}")
    return observation


def breaks(doing: str, task: Task, error: Exception) -> Observation:
    """`broken` by an exception, with a warning."""
    why = last_line(error)
    logging.getLogger(__name__).warning(
        "the environment broke in `%s` of %s: %s", doing, task.id, why
    )
    return broken(doing, why)


def broken(doing: str, why: str) -> Observation:
    """The last observation of an episode in which the environment broke."""
    text = f"The environment broke in `{doing}`: {why}."
    return Observation(text, text, (), end=BROKEN)


def last_line(error: Exception) -> str:
    """The last line of a traceback, and the place where it was raised."""
    file, line, *_ = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(file)}, line {line})"
