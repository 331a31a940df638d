"""The expert of FactbookQA.

It reads the question and the passages that its searches show, never the recorded answer. All it
knows beforehand is how the Factbook words its entries (`factbook_data`).
"""

import re

from opd_jax.envs.base import Observation, Task
from opd_jax.envs.search.answers import normalize
from opd_jax.envs.search.env import ANSWER, SEARCH
from opd_jax.envs.search.factbook import ASKED, BY_BORDER, BY_FACT, CLUES
from opd_jax.envs.search.factbook_data import (
    BORDERS,
    PROPERTIES,
    Property,
    borders,
    longest_border,
)
from opd_jax.envs.search.players import RESPONSE, searches_left
from opd_jax.envs.search.record import documents

FIND = "I need the country whose %s is %s."
FIND_NEIGHBOUR = "I need the country with the longest border to %s."
NOT_SHOWN = " The passages do not tell."
FOUND = "It is %s. I need its %s."
KNOWN = "The %s of %s is %s."
GIVE_UP = "I could not find it."
UNKNOWN = "unknown"


def _reads(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace("%s", "(.+)"))


_BY_FACT = _reads(ASKED.replace("country %s", f"country {BY_FACT}"))
_BY_BORDER = _reads(ASKED.replace("country %s", f"country {BY_BORDER}"))
_ASKED = {prop.noun: prop for prop in PROPERTIES}
_CLUES = {prop.noun: prop for prop in CLUES}


class Expert:
    """Finds the country, then the fact. If a search does not help, it tries other words.

    Args:
      task: its goal is the question.

    Raises:
      ValueError: the question is not one of FactbookQA's.
    """

    def __init__(self, task: Task):
        if match := _BY_FACT.fullmatch(task.goal):
            self._clue: Property | None = _CLUES[match[2]]
            self._value = match[3]
            self._aim = FIND % (self._clue.noun, self._value)
        elif match := _BY_BORDER.fullmatch(task.goal):
            self._clue, self._value = None, match[2]
            self._aim = FIND_NEIGHBOUR % self._value
        else:
            raise ValueError(f"expected a question of FactbookQA, got {task.goal!r}")
        self._asked = _ASKED[match[1]]
        self._country = ""
        self._shown: list[tuple[str, str, str]] = []
        self._tried: list[str] = []

    def respond(self, observation: Observation) -> str:
        """The next search, or the answer if a passage has shown it."""
        for title, text in documents(observation.text):
            country, _, heading = title.rpartition(": ")
            self._shown.append((country, heading, text))
        if not self._country and (country := self._find_country()):
            self._country, self._tried = country, []
            self._aim = FOUND % (country, self._asked.noun)
        if self._country and (answer := self._find_answer()):
            thought = KNOWN % (self._asked.noun, self._country, answer)
            return RESPONSE % (thought, ANSWER, answer)
        untried = [query for query in self._queries() if query not in self._tried]
        if not untried or searches_left(observation.text) == 0:
            return RESPONSE % (GIVE_UP, ANSWER, UNKNOWN)
        thought = self._aim + (NOT_SHOWN if self._tried else "")
        self._tried.append(untried[0])
        return RESPONSE % (thought, SEARCH, untried[0])

    def _find_country(self) -> str:
        for country, heading, text in self._shown:
            if self._clue is None:
                if (country, heading) == (self._value, BORDERS) and longest_border(text):
                    return longest_border(text)
            elif heading == self._clue.heading:
                stated = self._clue.read(text)
                if stated and normalize(stated[0]) == normalize(self._value):
                    return country
        return ""

    def _find_answer(self) -> str:
        for country, heading, text in self._shown:
            about = (country, heading) == (self._country, self._asked.heading)
            if about and (stated := self._asked.read(text)):
                return stated[0]
        return ""

    def _queries(self) -> list[str]:
        """The queries of this stage, most promising first."""
        if self._country:
            return _queries(self._country, self._asked)
        if self._clue:
            return _queries(self._value, self._clue)
        # Borders are mutual: a country whose list names this one is in the wanted list, too, so its
        # name is a good search word.
        neighbours = [country for country, _, text in self._shown if self._value in borders(text)]
        names = " ".join([self._value, *dict.fromkeys(neighbours)])
        return [f"{names} border countries", f"{names} {BORDERS}", f"{self._value} {names}"]


def _queries(subject: str, prop: Property) -> list[str]:
    words = f"{prop.heading} {prop.words}".strip()
    return [f"{subject} {prop.noun}", f"{subject} {words}", f"{subject} {subject} {words}"]
