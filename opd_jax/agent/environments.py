"""The environments of a batch: what they are asked, and when their answers count."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

from opd_jax.envs.base import Env
from opd_jax.envs.workers import Worker
from opd_jax.runtime import processes, progress
from opd_jax.runtime.exits import WorldFailed
from opd_jax.runtime.signals import signalled

# How often a signal is looked for while environments are waited for.
_LOOK_S = 0.5

T = TypeVar("T")


class Answers:
    """What the environments of a batch are asked, and their answers.

    Time is counted in chunks of sampled tokens. An answer is due `join_after` chunks after its
    question, and one that is late is waited for. So nothing depends on how long an environment
    takes.

    Environments that wait for a process or a server answer in threads, all at once. Others answer
    one after another, in `work`: an engine need not be thread-safe, and most would gain nothing.
    """

    def __init__(self, envs: Sequence[Env | None], *, join_after: int):
        self.envs, self.join_after, self.chunk = envs, join_after, 0
        self._asked: dict[int, tuple[int, Callable[[Env], Any]]] = {}  # by row; with the chunk
        self._answers: dict[int, Future] = {}  # by row, of this process
        own = [env for env in envs if env is not None]
        waits = own and all(env.waits for env in own)
        self._threads = ThreadPoolExecutor(len(own)) if waits else None

    def __bool__(self) -> bool:
        """Whether an answer is missing."""
        return bool(self._asked)

    def ask(self, row: int, act: Callable[[Env], Any]) -> None:
        """Asks a row's environment: `act(env)`, in the process that owns it."""
        self._asked[row] = self.chunk + self.join_after, act
        if self._threads and (env := self.envs[row]) is not None:
            self._answers[row] = self._threads.submit(act, env)

    def work(self) -> None:
        """Answers what was asked, unless threads do. A signal cuts it short."""
        for row, (_, act) in self._asked.items():
            if signalled():
                return
            if row not in self._answers and (env := self.envs[row]) is not None:
                answer: Future = Future()
                self._answers[row] = answer
                try:
                    answer.set_result(act(env))
                except WorldFailed as error:
                    answer.set_exception(error)

    def due(self) -> list[int]:
        """The rows whose answers are due."""
        return [row for row, (chunk, _) in self._asked.items() if chunk <= self.chunk]

    def take(self, rows: Sequence[int]) -> dict[int, Any]:
        """The answers of rows, in all processes. Every process has to call it; they are pickled.

        Raises:
          Stopped: a signal came to a process before it had its answers. A server that is away is
            asked for minutes, and the process may have seconds.
          WorldFailed: an environment raised it in one of the processes.
        """
        self.work()
        own = {n: row for n, row in enumerate(rows) if self.envs[row] is not None}
        given = processes.share(self._given(own), len(rows))
        for row in rows:
            del self._asked[row]
            self._answers.pop(row, None)
        return dict(zip(rows, given, strict=True))

    def _given(self, rows: Mapping[int, int]) -> dict[int, Any] | str | WorldFailed:
        """This process's answers, or why it has not all of them (`processes.share`)."""
        while missing := [row for row in rows.values() if not self._is_there(row)]:
            if came := signalled():
                return came
            wait([self._answers[row] for row in missing], timeout=_LOOK_S)
        try:
            return {n: self._answers[row].result() for n, row in rows.items()}
        except WorldFailed as error:
            return error

    def _is_there(self, row: int) -> bool:
        return row in self._answers and self._answers[row].done()

    def close(self) -> None:
        """Ends the threads, without waiting for what is still asked."""
        if self._threads:
            self._threads.shutdown(wait=False, cancel_futures=True)


def everywhere(
    act: Callable[[Env, Any], T], envs: Sequence[Env | None], arguments: Sequence[Any]
) -> list[T]:
    """`act(env, argument)` for each argument, in as many environments at a time as there are.

    All processes get all results. Errors as in `Answers.take`.
    """
    answers = Answers(envs, join_after=0)
    results: list[T] = []
    played = progress.begin("", total=len(arguments), unit="episodes")
    try:
        for start in range(0, len(arguments), len(envs)):
            for row, argument in enumerate(arguments[start : start + len(envs)]):
                answers.ask(row, partial(_act_on, act, argument))
            results += answers.take(answers.due()).values()
            played.done = len(results)
    finally:
        progress.end(played)
        answers.close()
    return results


def _act_on(act: Callable[[Env, Any], T], argument: Any, env: Env) -> T:
    return act(env, argument)


def make_envs(make: Callable[[], Env], count: int) -> list[Env | None]:
    """An environment for each row of a batch; None for a row that another process owns."""
    return [make() if processes.owns(row, count) else None for row in range(count)]


def close(envs: Sequence[Env | None]) -> None:
    """Ends the worker processes of environments now, not when they are garbage-collected."""
    for env in envs:
        if isinstance(env, Worker):
            env.close()
