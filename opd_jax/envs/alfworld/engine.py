"""ALFWorld's engine: TextWorld's PDDL environment with `alfworld`'s names for things.

Both packages are optional, so they are imported when an engine is made. (Fast Downward's translator
is under the GPL and takes minutes to compile.) Two results are cached, which changes no text: the
translation of a problem, needed four times to start a game, and the words of a command, which
depend only on what it acts on.
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

# The packages keep parsers, the translator, the environment variable and the expert's random
# generator in global variables, so only one thread at a time may use them.
LOCK = threading.Lock()


def alfworld_module(name: str) -> ModuleType:
    """Import a module of the optional extra.

    On its first import, `alfworld` would create a folder in the home directory and set
    `ALFWORLD_DATA`. Here it does neither.

    Args:
      name: for example `alfworld.info`.

    Raises:
      ValueError: it is not installed.
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
    """The engine's answer.

    Attributes:
      text: its words.
      admissible: the commands that are possible now, in alphabetical order.
      won: the goal is reached.
    """

    text: str
    admissible: tuple[str, ...]
    won: bool


class Engine:
    """Plays one game at a time; raises as `alfworld_module`."""

    def __init__(self) -> None:
        # TextWorld can do without it; we cannot.
        self._downward: Any = alfworld_module("fast_downward")
        infos = alfworld_module("textworld").EnvInfos(admissible_commands=True, won=True)
        wrappers = alfworld_module("alfworld.agents.environment.alfred_tw_env")
        self._pddl = alfworld_module("textworld.envs").PddlEnv(infos)
        self._env = wrappers.AlfredDemangler(self._pddl)

    def start(self, path: Path) -> Reply:
        """Load a game file and begin. Takes half a second, for a large kitchen several."""
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

        # With `optimize` it would also prepare for planning, which nobody does here.
        self._downward.pddl2sas = lambda domain, problem, **_: once(domain, problem)
        try:
            yield
        finally:
            self._downward.pddl2sas = translate
            sys.argv = argv  # the translator replaces it


def _reply(state: Mapping[str, Any]) -> Reply:
    return Reply(state["feedback"].strip(), tuple(state["admissible_commands"]), state["won"])


class _Grammar:
    """A text grammar that caches the words of each command.

    Args:
      grammar: TextWorld's.
      templates: the rules for commands. All other rules describe the state, so they are not cached.
    """

    def __init__(self, grammar: Any, templates: set[str]):
        self._grammar = grammar
        self._mentions = {rule: frozenset(re.findall(r"\w+", rule)) for rule in templates}
        self._words: dict[tuple, str] = {}

    def derive(self, rule: str, context: Mapping[str, Any]) -> str:
        """The words for a rule with the entities that `context` binds."""
        if rule not in self._mentions:
            return self._grammar.derive(rule, context)
        bound = sorted((role.name, entity.name) for role, entity in context["mapping"].items())
        key = (rule, *(pair for pair in bound if pair[0] in self._mentions[rule]))
        if key not in self._words:
            self._words[key] = self._grammar.derive(rule, context)
        return self._words[key]
