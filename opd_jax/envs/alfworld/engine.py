"""TextWorld's PDDL environment with `alfworld`'s names for things: optional packages, kept at bay.

The packages are imported when an engine is made, never before, since Fast Downward's translator is
under the GPL and compiling it takes minutes. Two results that the engine would work out again and
again are kept instead, which changes no text: the translation of a problem, needed four times to
start a game, and the words of a command, which depend on what it acts on and on nothing else.
"""

import functools
import importlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from opd_jax.envs.alfworld.panel import VARIABLE

# Parsers, translator, its settings, the environment variable and what the package's expert draws
# from are global: one thread at a time.
LOCK = threading.Lock()


def alfworld_module(name: str) -> ModuleType:
    """Import a module of the optional extra.

    `alfworld` makes a folder in the home and sets `ALFWORLD_DATA` when it is imported first; here
    it does neither.

    Args:
      name: for example `alfworld.info`.

    Raises:
      ValueError: it is not installed; says what to do.
    """
    with LOCK:
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = tempfile.gettempdir()
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                "ALFWorld needs packages that are not installed: pip install -e '.[alfworld]' "
                f"in the repository (importing {name}: {error})"
            ) from error
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before


class Reply(NamedTuple):
    """What the engine says.

    Attributes:
      text: its words.
      admissible: the commands that are possible now, in alphabetical order.
      won: the goal holds.
    """

    text: str
    admissible: tuple[str, ...]
    won: bool


class Engine:
    """One game at a time; errors as in `alfworld_module`."""

    def __init__(self) -> None:
        # Optional to TextWorld, and not to us.
        self._downward: Any = alfworld_module("fast_downward")
        infos = alfworld_module("textworld").EnvInfos(admissible_commands=True, won=True)
        wrappers = alfworld_module("alfworld.agents.environment.alfred_tw_env")
        self._pddl = alfworld_module("textworld.envs").PddlEnv(infos)
        self._env = wrappers.AlfredDemangler(self._pddl)

    def start(self, path: Path) -> Reply:
        """Load a game file and begin; about half a second, several for a large kitchen."""
        with LOCK, self._translating_once():
            self._env.load(str(path))
            logic = self._pddl._logic
            templates = {action.template for action in logic.actions.values()}
            logic.grammar = _Grammar(logic.grammar, templates)
            return _reply(self._env.reset())

    def act(self, command: str) -> Reply:
        """Carry out a command; one that is not admissible changes nothing."""
        with LOCK:
            return _reply(self._env.step(command)[0])

    @contextmanager
    def _translating_once(self) -> Iterator[None]:
        translate, argv = self._downward.pddl2sas, sys.argv

        @functools.cache
        def once(domain: str, problem: str) -> tuple[Any, str]:
            return translate(domain, problem)

        # The second form, asked for with `optimize`, would serve planning, which is never done.
        self._downward.pddl2sas = lambda domain, problem, **_: once(domain, problem)
        try:
            yield
        finally:
            self._downward.pddl2sas = translate
            sys.argv = argv  # the translator puts its own there


def _reply(state: Mapping[str, Any]) -> Reply:
    return Reply(state["feedback"].strip(), tuple(state["admissible_commands"]), state["won"])


class _Grammar:
    """A text grammar that derives the words of each command only once.

    Args:
      grammar: TextWorld's.
      templates: the rules that give commands; all others speak of the state of the world.
    """

    def __init__(self, grammar: Any, templates: set[str]):
        self._grammar = grammar
        self._mentions = {rule: frozenset(re.findall(r"\w+", rule)) for rule in templates}
        self._words: dict[tuple, str] = {}

    def derive(self, rule: str, context: Mapping[str, Any]) -> str:
        """The words for a rule, for those it mentions as they are bound in `context`."""
        if rule not in self._mentions:
            return self._grammar.derive(rule, context)
        bound = sorted((role.name, entity.name) for role, entity in context["mapping"].items())
        key = (rule, *(pair for pair in bound if pair[0] in self._mentions[rule]))
        if key not in self._words:
            self._words[key] = self._grammar.derive(rule, context)
        return self._words[key]
