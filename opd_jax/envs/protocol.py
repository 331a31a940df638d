"""What `envs.check` checks of an environment, a function each.

A function returns what is worth saying, or "". It raises `Breaks` where the protocol (`base.Env`)
is broken, and `Unusual` where it is kept and something is missing all the same.
"""

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

from opd_jax.envs.base import BROKEN, Env, MakePlayer, Observation, Task
from opd_jax.envs.faults import answered, checked
from opd_jax.envs.make import EnvSettings, find_env, labels_turns, own_players
from opd_jax.envs.react import RESPONSE
from opd_jax.envs.worker_process import encode
from opd_jax.envs.workers import Worker
from opd_jax.runtime.exits import WorldFailed

# Responses that a parser may not expect.
ODD = (
    "",
    " \n\t",
    "Action:",
    "Thought: I do not know.",
    RESPONSE % ("so.", "{} %s \\ <b>'\"</b> </script>"),
    "\x00\x1b[2J \u202e\u65e5\u672c \U0001f642",
    RESPONSE % ("so.", "go " * 5000),
)
UNKNOWN_SPLIT = "no such split"
WON = ("success", "won", "win", "solved")  # what may be meant by "success"
RECORD = {"seen", "held", "changed", "tried"}


class Breaks(Exception):
    """The protocol is broken; the text says how, and what to do."""


class Unusual(Exception):
    """Nothing is broken, but a run will do without something."""


class Start(NamedTuple):
    """What `reset` gives."""

    task: Task
    system: str
    observation: Observation


class Episode(NamedTuple):
    """One episode: of which task, who played it, the responses and the observations."""

    place: tuple[str, int]
    player: str
    responses: list[str]
    seen: list[Observation]


# --- In processes of their own: a hang or a crash ends there --------------------------------------


def sizes(worker: Worker, splits: Sequence[str]) -> str:
    """Each split has tasks."""
    found = {}
    for split in splits:
        try:
            found[split] = worker.size(split)
        except (ValueError, WorldFailed) as error:
            raise Breaks(f"`size({split!r})`: {error}; --splits names the splits to try") from None
        if found[split] < 1:
            raise Breaks(f"`size({split!r})`: expected at least 1, got {found[split]}")
    return ", ".join(f"{split} {size}" for split, size in found.items())


def unknown_split(worker: Worker, splits: Sequence[str]) -> str:
    """A split that there is not is refused, with the names of those that there are."""
    wanted = f"`size({UNKNOWN_SPLIT!r})`: expected a ValueError that names the known splits, got "
    try:
        size = worker.size(UNKNOWN_SPLIT)
    except ValueError as error:
        if any(split in str(error) for split in splits):
            return ""
        raise Breaks(f"{wanted}`{error}`") from None
    except WorldFailed as error:
        raise Breaks(wanted + str(error)) from None
    raise Breaks(f"{wanted}{size}")


def digests(worker: Worker, other: Worker, splits: Sequence[str]) -> str:
    """Each split's digest is a text, and the same in every process."""
    for split in splits:
        try:
            first, again, elsewhere = (env.digest(split) for env in (worker, worker, other))
        except (ValueError, WorldFailed) as error:
            raise Breaks(f"`digest({split!r})`: {error}") from None
        if not first:
            raise Breaks(f"`digest({split!r})`: expected a hash of the tasks, got an empty text")
        if not first == again == elsewhere:
            raise Breaks(
                f"`digest({split!r})` was {first!r}, then {again!r}, and {elsewhere!r} in another "
                "process: make it of what the tasks depend on with `hashlib`; `hash()` and the "
                "order of a set differ between processes"
            )
    return ""


def tasks(worker: Worker, other: Worker, places: Sequence[tuple[str, int]]) -> str:
    """A task depends on (split, index) alone, whatever was played before it. Its id is its own."""
    starts = {place: _start(worker, place) for place in places}
    for env in (worker, other):
        for place in reversed(places):
            again = _start(env, place)
            if not again.observation.done:
                env.step(ODD[0])
            where = "later" if env is worker else "in another process"
            if different := _difference(_fields(starts[place]), _fields(again)):
                split, index = place
                raise Breaks(
                    f"task {index} of {split!r} is no pure function of (split, index); {where}, "
                    f"{different}. Draw it from `random.Random(f'{{split}}/{{index}}')`"
                )
    by_id: dict[str, tuple[str, int]] = {}
    for place, start in starts.items():
        if (twin := by_id.setdefault(start.task.id, place)) != place:
            raise Breaks(f"tasks {twin} and {place} have one `id`, {start.task.id!r}")
    return f"{len(starts)} tasks, each started three times in two processes"


def _start(env: Env, place: tuple[str, int]) -> Start:
    try:
        first = env.reset(*place)
    except ValueError as error:
        raise Breaks(f"`reset{place}` refuses its task: {error}") from None
    if first.end == BROKEN:
        raise Breaks(f"`reset{place}`: {first.text}")
    return Start(env.task, env.system, first)


def play(
    env: Env, place: tuple[str, int], name: str, player: MakePlayer, *, max_turns: int
) -> Episode:
    """One episode. It is cut after `max_turns` responses, whether it has ended or not."""
    first = _start(env, place).observation
    episode = Episode(place, name, [], [first])
    playing = player(env.task, first, random.Random(0))
    while not episode.seen[-1].done and len(episode.responses) < max_turns:
        response = playing.respond(episode.seen[-1])
        if not isinstance(response, str):
            raise Breaks(f"player {name!r}: expected a text, got {response!r}")
        episode.responses.append(response)
        episode.seen.append(env.step(response))
        if episode.seen[-1].end == BROKEN:
            raise Breaks(
                f"turn {len(episode.responses)} of {place}, response {_short(response)}: "
                f"{episode.seen[-1].text}"
            )
    return episode


class Nonsense:
    """A player that makes no sense."""

    def __init__(self, task: Task, first: Observation, rng: random.Random):
        self._said = 0

    def respond(self, observation: Observation) -> str:
        """The next of the responses that a parser may not expect."""
        self._said += 1
        return ODD[(self._said - 1) % len(ODD)]


def ends(episodes: Sequence[Episode], *, max_turns: int) -> str:
    """Every episode ends after `max_turns` at the latest; `text` is what `message` contains."""
    for episode in episodes:
        last = episode.seen[-1]
        if not last.done:
            raise Breaks(
                f"{episode.place} goes on after `max_turns` = {max_turns} responses: give the last "
                "observation an `end`, such as 'turn_limit'"
            )
        if last.end.lower() in WON and not last.success:
            raise Breaks(f"`end`: expected 'success' where the goal is reached, got {last.end!r}")
        for seen in episode.seen:
            if seen.text not in seen.message:
                raise Breaks(
                    f"`message` = {_short(seen.message)} does not contain `text` = "
                    f"{_short(seen.text)}: the student would act on what the judge is not shown"
                )
    found = sorted({episode.seen[-1].end for episode in episodes})
    return f"{len(episodes)} episodes ended with {', '.join(found)}"


def again(env: Env, episodes: Iterable[Episode], *, where: str) -> str:
    """Equal responses have equal answers."""
    for episode in episodes:
        seen = [answered(env, env.reset(*episode.place))]
        seen += [answered(env, env.step(response)) for response in episode.responses]
        for turn, (one, other) in enumerate(zip(episode.seen, seen, strict=True)):
            if different := _difference(_observed(one), _observed(other)):
                raise Unusual(
                    f"turn {turn} of {episode.place} was answered otherwise {where}: {different}. "
                    "A run does not repeat to the bit, and a resumed one is another"
                )
    return "a state can be replayed"


# --- In this process ----------------------------------------------------------------------------


def members(env: Env, place: tuple[str, int]) -> str:
    """`system`, `waits` and `task` have their types."""
    checked(env.reset(*place))
    for name, kind in (("system", str), ("waits", bool), ("task", Task)):
        value = getattr(env, name, None)
        if not isinstance(value, kind):
            raise Breaks(f"`{name}`: expected a {kind.__name__}, got {value!r}")
    return ""


def step_after_end(env: Env, episodes: Sequence[Episode]) -> str:
    """A step of an episode that has ended raises ValueError."""
    ended = [episode for episode in episodes if episode.seen[-1].done]
    if not ended:
        raise Unusual("no episode has ended")
    env.reset(*ended[0].place)
    for response in ended[0].responses:
        env.step(response)
    wanted = "`step` after the end: expected a ValueError (`envs.turns.TurnClock` raises it), got "
    try:
        answer = env.step(ODD[0])
    except ValueError:
        return ""
    except Exception as error:
        raise Breaks(f"{wanted}{error!r}") from None
    raise Breaks(wanted + _short(answer))


# --- Optional members ---------------------------------------------------------------------------


def commands(episodes: Sequence[Episode]) -> str:
    """The random player finds commands, and some of its turns do not fail."""
    seen = [seen for episode in episodes for seen in episode.seen if not seen.done]
    if not any(observation.admissible for observation in seen):
        raise Unusual("no `admissible` commands: leave `random` out of `eval.who`")
    tried = [seen for e in episodes if e.player == "random" for seen in e.seen[1:]]
    if tried and all(observation.failure for observation in tried):
        raise Unusual(
            f"every turn of the random player fails ({tried[0].failure!r}): `admissible` lists "
            "commands that would succeed, and it answers in the form of `envs.react`; bring a "
            "`random` of your own in `players`"
        )
    return ""


def labels(settings: EnvSettings, episodes: Sequence[Episode]) -> str:
    """Whether turns have labels is what `labels_turns` says."""
    found = sorted({seen.oracle for episode in episodes for seen in episode.seen} - {""})
    says = labels_turns(settings.by)
    if found and not says:
        raise Breaks(f"`labels_turns` is False, but observations have `oracle` = {found}")
    if found:
        return ", ".join(found)
    raise Unusual(
        "no `oracle`: a run cannot measure the judge, nor take the environment for one"
        + "; say `labels_turns = False`" * says
    )


def options(settings: EnvSettings) -> str:
    """`world` and `figures` name arguments."""
    kind = find_env(settings.by)
    named = {name: tuple(getattr(kind, name, ())) for name in ("world", "figures")}
    for field, names in named.items():
        if strange := [name for name in names if name not in signature(kind).parameters]:
            raise Breaks(f"`{field}` names {strange[0]!r}, which is none of its arguments")
    if not any(named.values()):
        raise Unusual("no `world` and `figures`: a run is resumed with equal arguments only")
    return "; ".join(f"{field}: {', '.join(names)}" for field, names in named.items() if names)


def invented(settings: EnvSettings) -> str:
    """`invented` is a compiled pattern."""
    pattern = getattr(find_env(settings.by), "invented", None)
    if pattern is None:
        raise Unusual("none: `envs.turns.invented_turn()` finds where a response plays the world")
    if not isinstance(pattern, re.Pattern):
        raise Breaks(f"`invented`: expected a compiled pattern, got {pattern!r}")
    return ""


def players(settings: EnvSettings) -> str:
    """`players` maps names to functions."""
    own = own_players(settings.by)
    if not isinstance(own, Mapping) or not all(map(callable, own.values())):
        raise Breaks(f"`players`: expected functions by name, got {own!r}")
    return ", ".join(own)


def expert(episodes: Sequence[Episode]) -> str:
    """There is an expert, and it reaches the goal now and then."""
    solved = [e.seen[-1].success for e in episodes if e.player == "expert"]
    if not solved:
        raise Unusual("none: leave it out of `eval.who`; `data.source` cannot be expert")
    if not any(solved):
        raise Unusual(f"it solves none of {len(solved)} tasks")
    return f"it solves {sum(solved)} of {len(solved)} tasks"


def record(env: Env, episode: Episode) -> str:
    """`record()` has the four lists of texts (`base.Records`)."""
    if not hasattr(env, "record"):
        raise Unusual("none (`envs.base.Records`)")
    env.reset(*episode.place)
    for response in (None, *episode.responses):
        if response is not None:
            env.step(response)
        kept = env.record()
        texts = isinstance(kept, Mapping) and [t for part in kept.values() for t in part]
        if texts is False or set(kept) != RECORD or not all(isinstance(t, str) for t in texts):
            raise Breaks(f"`record()`: expected lists of texts {sorted(RECORD)}, got {kept!r}")
    return ""


def copies(env: Env, episode: Episode) -> str:
    """A copy answers as its original does, and neither moves the other."""
    if not hasattr(env, "copy"):
        raise Unusual("none (`envs.base.Copies`)")
    env.reset(*episode.place)
    for turn, response in enumerate(episode.responses):
        aside = env.copy()
        answer = answered(aside, aside.step(response))
        first = _observed(answer)
        if not answer.done:
            aside.step(ODD[0])
        another = env.copy()
        second = _observed(answered(another, another.step(response)))
        third = _observed(answered(env, env.step(response)))
        for other in (second, third):
            if different := _difference(first, other):
                raise Breaks(f"`copy()` in turn {turn} of {episode.place}: {different}")
    return ""


def label(env: Env, episode: Episode) -> str:
    """`label(response)` is the `oracle` that the step then has, and changes nothing."""
    if not hasattr(env, "label"):
        raise Unusual("none (`envs.base.Labels`)")
    env.reset(*episode.place)
    for response, seen in zip(episode.responses, episode.seen[1:], strict=True):
        said = env.label(ODD[0]), env.label(response)
        now = answered(env, env.step(response))
        if said[1] != now.oracle:
            raise Breaks(
                f"`label({_short(response)})` = {said[1]!r}, but its step has {now.oracle!r}"
            )
        if different := _difference(_observed(seen), _observed(now)):
            raise Breaks(f"`label` changes the episode: {different}")
    return ""


# --- Comparing ----------------------------------------------------------------------------------


def _observed(observation: Observation) -> dict[str, Any]:
    """An observation as plain data, as a worker sends it."""
    return json.loads(encode(vars(checked(observation))))


def _fields(start: Start) -> dict[str, Any]:
    return {**vars(start.task), "system": start.system, **_observed(start.observation)}


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first field in which they differ, in words; "" if none."""
    for name in one:
        if one[name] != other[name]:
            return f"`{name}` was {_short(one[name])}, and is {_short(other[name])}"
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
