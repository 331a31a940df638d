"""How players of the search environment write and read turns, and a random player."""

import random
import re

from opd_jax.envs.base import Observation
from opd_jax.envs.search.env import ANSWER, SEARCH
from opd_jax.envs.search.record import documents

RESPONSE = "<thought>%s</thought>\n<action>%s[%s]</action>"

_SEARCHES_LEFT = re.compile(r"Searches left: (\d+)\.$")


def searches_left(text: str) -> int | None:
    """The number of searches left; None if the observation does not say it."""
    match = _SEARCHES_LEFT.search(text)
    return int(match[1]) if match else None


class Random:
    """Searches for words of the question or of passages shown so far, or answers with one.

    Args:
      question: the question.
      rng: source of all its randomness.
    """

    def __init__(self, question: str, *, rng: random.Random):
        self._words = re.findall(r"\w+", question)
        self._rng = rng

    def respond(self, observation: Observation) -> str:
        """A search three times out of four, else an answer."""
        for title, text in documents(observation.text):
            self._words += re.findall(r"\w+", f"{title} {text}")
        if self._rng.random() < 0.75:
            query = " ".join(self._rng.choices(self._words, k=2))
            return RESPONSE % ("Let me try this.", SEARCH, query)
        return RESPONSE % ("Let me guess.", ANSWER, self._rng.choice(self._words))
