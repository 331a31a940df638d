"""A number to guess, as a sound environment, and one for each way to break the protocol.

Workers' processes import this file, so it imports little.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any, ClassVar

from opd_jax.envs.base import Observation, Task
from opd_jax.envs.react import INVENTED, RESPONSE, parse_response
from opd_jax.envs.turns import TurnClock


class Halving:
    """The expert: halves what is left."""

    def __init__(self, task: Task, first: Observation, rng: random.Random):
        self._low, self._high, self._guess = 1, 9, 0

    def respond(self, observation: Observation) -> str:
        if "larger" in observation.text:
            self._low = self._guess + 1
        elif "smaller" in observation.text:
            self._high = self._guess - 1
        self._guess = (self._low + self._high) // 2
        return RESPONSE % ("half.", f"guess {self._guess}")


class Sound:
    """A number from 1 to 9 is to be guessed. It has every optional member."""

    system = "Guess a number from 1 to 9."
    waits = False
    world = ("pace_s",)
    invented: Any = INVENTED
    players: ClassVar[dict[str, Any]] = {"expert": Halving}

    def __init__(self, *, max_turns: int, pace_s: float = 0.0):
        self._clock = TurnClock(max_turns)
        self._args = dict(max_turns=max_turns, pace_s=pace_s)

    def size(self, split: str) -> int:
        if split not in ("train", "test"):
            raise ValueError(f"expected the split train or test, got {split!r}")
        return 100

    def digest(self, split: str) -> str:
        return f"guess-{split}"

    def reset(self, split: str, index: int) -> Observation:
        self._number = random.Random(f"{split}/{index}").randint(1, 9)
        self._said: list[str] = []
        self.task = Task(f"guess/{split}/{index}", "guess", "guess the number", self.system)
        self._clock.start()
        return self._see(self.system)

    def step(self, response: str) -> Observation:
        self._clock.tick()
        oracle = self.label(response)
        command, failure = parse_response(response)
        guess = command.removeprefix("guess ")
        if not failure and guess not in "123456789":
            failure = "rejected"
        self._said.append(command or failure)
        if failure:
            return self._see("Say `Action: guess 5`.", command, failure)
        if int(guess) == self._number:
            return self._see("Right!", command, end="success", oracle=oracle)
        side = "larger" if int(guess) < self._number else "smaller"
        return self._see(f"It is {side}.", command, oracle=oracle)

    def label(self, response: str) -> str:
        command, failure = parse_response(response)
        guess = command.removeprefix("guess ")
        if failure or guess not in "123456789":
            return ""
        return "SKIP" if int(guess) == self._number else "STRONG"

    def record(self) -> Any:
        return {"seen": [], "held": [], "changed": [], "tried": list(self._said)}

    def copy(self) -> "Sound":
        other = type(self)(**self._args)
        for name in ("_number", "task"):
            setattr(other, name, getattr(self, name))
        other._said = list(self._said)
        other._clock.start()
        for _ in self._said:
            other._clock.tick()
        return other

    def _see(self, text: str, action="", failure="", end="", oracle="") -> Observation:
        end = self._clock.end(end)
        commands = tuple(f"guess {n}" for n in range(1, 10))
        score = float(end == "success")
        return Observation(text, text, commands, end, score, action, failure, oracle)


class Plain:
    """Nothing but what a run needs. Its answers depend on more than the responses."""

    system = "Say go."
    waits = False

    def __init__(self, *, max_turns: int):
        self._clock = TurnClock(max_turns)

    def size(self, split: str) -> int:
        return Sound.size(self, split)  # type: ignore[arg-type]

    def digest(self, split: str) -> str:
        return "plain"

    def reset(self, split: str, index: int) -> Observation:
        self.task = Task(f"plain/{split}/{index}", "plain", "go", "")
        self._clock.start()
        return Observation("Go.", "Go.", ("go",))

    def step(self, response: str) -> Observation:
        self._clock.tick()
        text = f"It is {time.monotonic()}."
        return Observation(text, text, ("go",), self._clock.end(""))


class NoArguments(Sound):
    def __init__(self):
        super().__init__(max_turns=8)


def of_a_function() -> type:
    class Local(Sound):
        pass

    return Local


Unpicklable = of_a_function()


class RaisesWhenMade(Sound):
    def __init__(self, *, max_turns: int):
        raise RuntimeError("no board")


class NoTasks(Sound):
    def size(self, split: str) -> int:
        return 0 * super().size(split)


class SizeIsAFloat(Sound):
    def size(self, split: str) -> Any:
        return float(super().size(split))


class AnySplit(Sound):
    def size(self, split: str) -> int:
        return 100


class SplitIsAKey(Sound):
    def size(self, split: str) -> int:
        return {"train": 100, "test": 100}[split]


class DigestOfHash(Sound):
    def digest(self, split: str) -> str:
        return str(hash(("guess", split)))


class DigestIsANumber(Sound):
    def digest(self, split: str) -> Any:
        return 17


class TasksFromGlobalRandom(Sound):
    def reset(self, split: str, index: int) -> Observation:
        first = super().reset(split, index)
        hint = f"Not {random.random()}. "
        return Observation(hint + first.text, hint + first.message, first.admissible)


class TasksInOrder(Sound):
    """The first task of a new object is another one."""

    _begun = 0

    def reset(self, split: str, index: int) -> Observation:
        self._begun += 1
        first = super().reset(split, index)
        self.task = Task(self.task.id, "guess", f"guess number {self._begun}", "")
        return first


class OneId(Sound):
    def reset(self, split: str, index: int) -> Observation:
        first = super().reset(split, index)
        self.task = Task("guess", "guess", "guess the number", "")
        return first


class Refuses(Sound):
    def reset(self, split: str, index: int) -> Observation:
        raise ValueError("no such number")


class Hangs(Sound):
    def step(self, response: str) -> Observation:
        while True:
            time.sleep(1)


class HangsInReset(Sound):
    def reset(self, split: str, index: int) -> Observation:
        while True:
            time.sleep(1)


class Dies(Sound):
    def step(self, response: str) -> Observation:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class ChokesOnNonsense(Sound):
    def step(self, response: str) -> Observation:
        command = response.split("Action: ")[1]
        return super().step(f"Action: {command}")


class AnswersATuple(Sound):
    """As a Gymnasium environment does."""

    def step(self, response: str) -> Any:
        return "It is larger.", 0.0, False, False, {}


class AnswersNone(Sound):
    def step(self, response: str) -> Any:
        super().step(response)


def changed(observation: Observation, **fields: Any) -> Observation:
    return Observation(**{**vars(observation), **fields})


class TextIsANumber(Sound):
    def step(self, response: str) -> Observation:
        return changed(super().step(response), text=5, message=5)


class ScoreIsNaN(Sound):
    def step(self, response: str) -> Observation:
        return changed(super().step(response), score=float("nan"))


class AdmissibleIsAGenerator(Sound):
    def step(self, response: str) -> Observation:
        def commands() -> Iterator[str]:
            yield "guess 1"

        return changed(super().step(response), admissible=commands())


class OracleOfItsOwn(Sound):
    def step(self, response: str) -> Observation:
        return changed(super().step(response), oracle="GOOD")


class NeverEnds(Sound):
    def __init__(self, *, max_turns: int, pace_s: float = 0.0):
        super().__init__(max_turns=10 * max_turns)
        self._args = dict(max_turns=max_turns)


class Wins(Sound):
    """Another word for success."""

    def step(self, response: str) -> Observation:
        seen = super().step(response)
        return changed(seen, end="won") if seen.end == "success" else seen


class HidesText(Sound):
    def step(self, response: str) -> Observation:
        return changed(super().step(response), message="?")


class GoesOn(Sound):
    """Answers steps after the end."""

    def step(self, response: str) -> Observation:
        if not self._clock._running:
            return Observation("Over.", "Over.", (), end="over")
        return super().step(response)


class StepsFailAfterTheEnd(Sound):
    def step(self, response: str) -> Observation:
        try:
            return super().step(response)
        except ValueError:
            raise KeyError("number") from None


class NoWaits(Sound):
    waits: Any = None


class SystemIsNone(Sound):
    system: Any = None

    def _see(self, text: str, *args: Any, **how: Any) -> Observation:
        return super()._see(text or "Guess.", *args, **how)


class WorldOfStrangers(Sound):
    world = ("speed",)


class InventedIsAText(Sound):
    invented = "Observation:"


class PlayersAreNames(Sound):
    players: ClassVar[dict[str, Any]] = {"expert": "halving"}


class Mute:
    def __init__(self, task: Task, first: Observation, rng: random.Random):
        pass

    def respond(self, observation: Observation) -> Any:
        return None


class ExpertIsMute(Sound):
    players: ClassVar[dict[str, Any]] = {"expert": Mute}


class DeniesLabels(Sound):
    labels_turns = False


class RecordIsAList(Sound):
    def record(self) -> Any:
        return list(self._said)


class RecordWithoutLists(Sound):
    def record(self) -> Any:
        return {"seen": self._said}


class CopiesItself(Sound):
    def copy(self) -> Sound:
        return self


class LabelsAlike(Sound):
    def label(self, response: str) -> str:
        return "WEAK"

    def step(self, response: str) -> Observation:
        return changed(super().step(response), oracle="SKIP")


class LabelMoves(Sound):
    def label(self, response: str) -> str:
        self._number = self._number % 9 + 1
        return super().label(response)
