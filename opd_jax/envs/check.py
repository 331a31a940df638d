"""Plays an environment and says what breaks the protocol (`envs.base.Env`).

    python -m opd_jax.envs.check my_package.module:Class [--splits=train,test] [--OPTION=VALUE ...]

Options are the fields of a config's section `env`: `max_turns` (8 unless given), `step_timeout_s`
(10), `start_timeout_s` (60), and the environment's own arguments. A few tasks of each split of
`--splits` (train unless given) are played at random, by the environment's own players, and with
responses that make no sense. The exit status is 0 if everything holds, 2 if something breaks.
"""

import ast
import faulthandler
import os
import sys
import textwrap
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any, NamedTuple

from opd_jax.envs import protocol
from opd_jax.envs.base import MakePlayer
from opd_jax.envs.faults import last_line
from opd_jax.envs.make import EnvSettings, make_env
from opd_jax.envs.players import make_player
from opd_jax.envs.protocol import Breaks, Episode, Unusual
from opd_jax.envs.workers import Worker
from opd_jax.runtime.exits import reported

OK, NOTE, BREAKS = "ok", "note", "BREAKS"
# Where one of these breaks, nothing further can be checked.
NEEDED = ("name, arguments", "made in a process", "tasks", "players", "answers")


class Finding(NamedTuple):
    """A line of the table: what was checked, how it is, and what to know or do."""

    what: str
    state: str
    text: str


def check(settings: EnvSettings, splits: Sequence[str]) -> Iterator[Finding]:
    """Plays the environment that `settings` name, and gives each finding as it is found.

    It ends where nothing further can be checked.
    """
    with closing(_in_workers(settings, splits)) as checks:
        for what, act in checks:
            finding = _tried(what, act)
            yield finding
            if finding.state == BREAKS and what in NEEDED:
                return


def _tried(what: str, act: Callable[[], object]) -> Finding:
    try:
        result = act()
    except Unusual as unusual:
        return Finding(what, NOTE, str(unusual))
    except Breaks as breaks:
        return Finding(what, BREAKS, str(breaks))
    except Exception as error:  # of a member that nothing guards
        return Finding(what, BREAKS, f"it raised {last_line(error)}")
    return Finding(what, OK, result if isinstance(result, str) else "")


Checks = Generator[tuple[str, Callable[[], object]]]


def _in_workers(settings: EnvSettings, splits: Sequence[str]) -> Checks:
    """Plays in two processes, where a hang ends at the limits of a run; then in this one."""
    workers: list[Worker] = []
    yield "name, arguments", lambda: workers.extend(_worker(settings) for _ in range(2))
    one, other = workers
    with closing(one), closing(other):
        yield "made in a process", lambda: protocol.sizes(one, splits)
        yield "unknown split", lambda: protocol.unknown_split(one, splits)
        yield "digest", lambda: protocol.digests(one, other, splits)
        places = _places({split: one.size(split) for split in splits})
        yield "tasks", lambda: protocol.tasks(one, other, places)
        yield "players", lambda: protocol.players(settings)
        playing, episodes = _players(settings), list[Episode]()

        def play() -> str:
            for place in places:
                for name, player in playing.items():
                    how = dict(max_turns=settings.max_turns)
                    episodes.append(protocol.play(one, place, name, player, **how))
            return f"{len(episodes)} episodes of {', '.join(playing)}"

        yield "answers", play
        yield "end", lambda: protocol.ends(episodes, max_turns=settings.max_turns)
        yield "equal answers", lambda: protocol.again(other, episodes, where="in another process")
    yield from _in_this_process(settings, episodes)


def _in_this_process(settings: EnvSettings, episodes: Sequence[Episode]) -> Checks:
    """Plays the same episodes here. A hang ends the command, with a traceback that says where."""
    faulthandler.dump_traceback_later(2 * settings.start_timeout_s, exit=True, file=2)
    env, one = make_env(settings), episodes[min(1, len(episodes) - 1)]  # the random player's
    yield "members", lambda: protocol.members(env, one.place)
    yield "in this process", lambda: protocol.again(env, episodes, where="in this process")
    yield "step after the end", lambda: protocol.step_after_end(env, episodes)
    yield "world, figures", lambda: protocol.options(settings)
    yield "labels_turns", lambda: protocol.labels(settings, episodes)
    yield "invented", lambda: protocol.invented(settings)
    yield "admissible", lambda: protocol.commands(episodes)
    yield "expert", lambda: protocol.expert(episodes)
    yield "record()", lambda: protocol.record(env, one)
    yield "copy()", lambda: protocol.copies(env, one)
    yield "label()", lambda: protocol.label(env, one)
    faulthandler.cancel_dump_traceback_later()


def _worker(settings: EnvSettings) -> Worker:
    try:
        worker = make_env(replace(settings, workers=True))
    except ValueError as error:
        raise Breaks(str(error)) from None
    assert isinstance(worker, Worker)
    return worker


def _places(sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    """The first two tasks of each split, one in the middle and the last."""
    return [
        (split, index)
        for split, size in sizes.items()
        for index in sorted({0, min(1, size - 1), size // 2, size - 1})
    ]


def _players(settings: EnvSettings) -> dict[str, MakePlayer]:
    """Those that there are of `random` and `expert`, and one that makes no sense."""
    found: dict[str, MakePlayer] = {"nonsense": protocol.Nonsense}
    for name in ("random", "expert"):
        with suppress(ValueError):  # it has no such player
            found[name] = make_player(name, settings, field="players", habits={})
    return found


def line(finding: Finding) -> str:
    """A finding as lines of a table."""
    head = f"{finding.what:18}  {finding.state:6}  "
    wrapped = textwrap.wrap(finding.text, 110 - len(head)) or [""]
    return (head + ("\n" + " " * len(head)).join(wrapped)).rstrip()


def read_arguments(argv: Sequence[str]) -> tuple[EnvSettings, tuple[str, ...]]:
    """The settings and the splits that a command line names.

    Raises:
      ValueError: it names no environment, or an argument is not `--NAME=VALUE`.
    """
    [by, *rest] = argv or [""]
    if not by or by.startswith("-"):
        raise ValueError("name an environment, such as my_package.module:Class; --help says more")
    given: dict[str, Any] = dict(max_turns=8, start_timeout_s=60.0, step_timeout_s=10.0)
    for argument in rest:
        name, equals, text = argument.partition("=")
        if not name.startswith("--") or not equals:
            raise ValueError(f"expected --NAME=VALUE, got `{argument}`")
        try:
            given[name[2:]] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            given[name[2:]] = text
    splits = tuple(str(given.pop("splits", "train")).split(","))
    own = {name: given.pop(name) for name in ("max_turns", "start_timeout_s", "step_timeout_s")}
    options = tuple(sorted(given.items()))
    return EnvSettings(by=by, workers=False, options=options, **own), splits


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.envs.check`."""
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return
    with reported():
        settings, splits = read_arguments(argv)
        os.environ.pop("PYTHONHASHSEED", None)  # it would hide that `hash()` differs
        broken = 0
        for finding in check(settings, splits):
            print(line(finding), flush=True)
            broken += finding.state == BREAKS
        if broken:
            raise ValueError(f"`{settings.by}` breaks the protocol in {broken} of these checks")
        print(f"`{settings.by}` keeps the protocol")


if __name__ == "__main__":
    main(sys.argv[1:])
