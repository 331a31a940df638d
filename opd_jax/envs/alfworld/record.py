"""The record of an episode of ALFWorld (`base.Records`), read from what the engine says."""

import re

from opd_jax.envs.turns import REJECTED, first_sentence, tried

# Verb -> what it changes, and what the thing is then.
TREATMENTS = {
    "heat": ("temperature", "hot"),
    "cool": ("temperature", "cool"),
    "clean": ("dirt", "clean"),
}

_TOOK = re.compile(r"You pick up the (\w+ \d+) from the (\w+ \d+)\.")
_MOVED = re.compile(r"You (?:move|put) the (\w+ \d+) (?:to|in/on) the (\w+ \d+)\.")
_TREATED = re.compile(r"You (clean|heat|cool) the (\w+ \d+) using")
_SWITCHED = re.compile(r"You turn (on|off) the (\w+ \d+)\.")
_DOOR = re.compile(r"You (open|close) the (\w+ \d+)\.")
_CLOSED = re.compile(r"The (\w+ \d+) is closed\.")
_SEEN = re.compile(r"(?:On the (\w+ \d+)|The (\w+ \d+) is open\. In it), you see (.*)\.")
_NAMED = re.compile(r"[a-z]+ \d+")


class Record:
    """What the texts of an episode have told so far.

    Attributes:
      hand: the object in hand; "" for none.
      place: object seen lying somewhere -> its receptacle.
      changed: (name, what of it has changed) -> how it is now. What was changed back is not there.
    """

    def __init__(self) -> None:
        self.hand = ""
        self.place: dict[str, str] = {}
        self.changed: dict[tuple[str, str], str] = {}
        self._closed: dict[str, bool] = {}  # receptacle -> it was closed when last told of
        self._looked: set[str] = set()  # the receptacles whose content was told
        self._tried: list[str] = []

    def read(self, command: str, text: str, *, failed: bool) -> None:
        """Read the engine's text after a command; "" for no command. `failed`: it did nothing."""
        if command:
            self._tried.append(tried(command, REJECTED if failed else first_sentence(text)))
        if match := _TOOK.match(text):
            self.hand = match[1]
            self.place.pop(match[1], None)
            self.changed.pop((match[1], "place"), None)
        elif match := _MOVED.match(text):
            self.hand = ""
            self.place[match[1]] = match[2]
            self.changed[match[1], "place"] = f"moved to {match[2]}"
        elif match := _TREATED.match(text):
            kind, word = TREATMENTS[match[1]]
            self.changed[match[2], kind] = word
        elif match := _SWITCHED.match(text):
            self._switch(match[2], match[1])
        elif match := _DOOR.match(text):
            self._closed[match[2]] = match[1] == "close"
            self._switch(match[2], "closed" if match[1] == "close" else "open")
        self._look(text)

    def _switch(self, name: str, word: str) -> None:
        """Of two states the other one; the second time it is as it was."""
        if not self.changed.pop((name, "state"), ""):
            self.changed[name, "state"] = word

    def _look(self, text: str) -> None:
        if match := _CLOSED.search(text):
            self._closed[match[1]] = True
        elif match := _SEEN.search(text):
            here = match[1] or match[2]
            self._closed[here] = False
            self._looked.add(here)
            gone = [thing for thing, place in self.place.items() if place == here]
            for thing in gone:
                del self.place[thing]
            self.place |= dict.fromkeys(_NAMED.findall(match[3]), here)

    def lists(self) -> dict[str, list[str]]:
        """The four lists of `base.Records`, places in the order in which they were first seen.

        - `seen`: `desk 1: pen 2, cd 1`; `desk 1: nothing`; `safe 1, closed` if its content was
          never told, else `safe 1, closed: cd 1`.
        - `changed`: `apple 1: hot and clean`; `safe 1: open`; `cd 1: moved to desk 1`.
        - `tried`: `go to desk 1: You arrive at desk 1.`; `open desk 1: Nothing happens.`
        """
        changed: dict[str, list[str]] = {}
        for (name, _), word in self.changed.items():
            changed.setdefault(name, []).append(word)
        return {
            "seen": [self._described(place) for place in self._closed],
            "held": [self.hand] if self.hand else [],
            "changed": [f"{name}: {' and '.join(words)}" for name, words in changed.items()],
            "tried": list(self._tried),
        }

    def _described(self, place: str) -> str:
        name = place + ", closed" * self._closed[place]
        held = ", ".join(thing for thing, where in self.place.items() if where == place)
        return f"{name}: {held or 'nothing'}" if place in self._looked else name
