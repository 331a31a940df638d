"""What an environment raises ends its own episode, as a fault in a worker's process does."""

import logging
import os
import traceback
from typing import NamedTuple

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
        return Begun(env.reset(split, index), env.task, env.system)
    except WorldFailed:
        raise
    except Exception as error:
        task = Task(id=f"{split}/{index}", type="", goal="", scene="")
        if isinstance(error, ValueError | ImportError):
            return Begun(broken("reset", str(error)), task, "", refused=str(error))
        _warn("reset", task, error)
        return Begun(broken("reset", last_line(error)), task, "")


def act(env: Env, response: str) -> Observation:
    """Gives a response to the environment. Raises `WorldFailed` alone."""
    try:
        return env.step(response)
    except WorldFailed:
        raise
    except Exception as error:
        _warn("step", env.task, error)
        return broken("step", last_line(error))


def broken(doing: str, why: str) -> Observation:
    """The last observation of an episode in which the environment broke."""
    text = f"The environment broke in `{doing}`: {why}."
    return Observation(text, text, (), end=BROKEN)


def last_line(error: Exception) -> str:
    """The last line of a traceback, and the place where it was raised."""
    file, line, *_ = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(file)}, line {line})"


def _warn(doing: str, task: Task, error: Exception) -> None:
    logging.getLogger(__name__).warning(
        "the environment broke in `%s` of %s: %s", doing, task.id, last_line(error)
    )
