"""The record of an episode of ScienceWorld (`base.Records`), read from what the engine says.

It is as exact as the texts: a room is listed as it was when it was last looked at, and two things
of one name in one room are told apart only where the engine asks which of them is meant.
"""

import re
from collections.abc import Sequence

from opd_jax.envs.turns import REJECTED, first_sentence, tried

_ROOM = re.compile(r"This (?:room|outside location) is called the (.+?)\. (?:In it,|Here) you see:")
_CONTENT = re.compile(r"\b(?:Inside|On|In) the ([^\n]+) is:((?:\n\t[^\n]+)+)")
_LINES = re.compile(r"^\t(.+)$", re.MULTILINE)
_DOOR = re.compile(r"A door to the (.+?) \(that is (\w+)\)")
_AGENT = "the agent"
_WENT = re.compile(r"You (?:move|teleport) to the (.+)\.")
_MOVED = re.compile(r"You move the (.+) to the (.+)\.")
_INVENTORY = "inventory"
_SWITCHED = re.compile(r"The (.+) is now (open|closed|activated|deactivated)\.")
_MEASURED = re.compile(r"the thermometer measures a temperature of (.+)")
_USED_ON = re.compile(r"use .+? on (.+)")
_FOCUSED = re.compile(r"You focus on the (.+)\.")
_CONNECTED = re.compile(r"(.+) is now connected to (.+)")
_DISCONNECTED = re.compile(r"(.+) has been disconnected")
_OPTION = re.compile(r"^(\d+):\t(.+)$", re.MULTILINE)


class Record:
    """What the texts of an episode have told so far."""

    def __init__(self) -> None:
        self._here = ""  # the room where the agent is
        self._seen: dict[str, list[str]] = {}
        self._held: Sequence[str] = ()
        self._changed: dict[tuple[str, str], str] = {}
        self._tried: list[str] = []
        self._asked: dict[str, str] = {}  # the commands that the engine offers by number

    def read(self, command: str, text: str, *, held: Sequence[str], failed: bool) -> None:
        """Read the engine's text after a command.

        Args:
          command: as it was given; "" for the first text.
          text: the engine's answer.
          held: what the inventory lists in the same message.
          failed: the engine did not carry the command out.
        """
        command = self._asked.get(command, command)
        self._asked = dict(_OPTION.findall(text))
        self._held = held
        if command:
            ending = first_sentence(text)
            self._tried.append(tried(command, f"{REJECTED} {ending}" if failed else ending))
        if match := _WENT.fullmatch(text):
            self._here = match[1]
        self._look(text)
        self._change(command, text)

    def _look(self, text: str) -> None:
        """A room or a container with what it holds."""
        doors = [f"door to the {room} ({state})" for room, state in _DOOR.findall(text)]
        if room := _ROOM.search(text):
            things = [line for line in _LINES.findall(text) if not _DOOR.match(line)]
            if _AGENT in things:  # not looked at from another room
                things.remove(_AGENT)
                self._here = room[1]
            name = room[1]
        elif content := _CONTENT.search(text):
            things = _LINES.findall(content[2])
            name = content[1] if doors else f"{content[1]} in {self._here}"
        else:
            return
        if name != f"{_INVENTORY} in {self._here}":
            self._seen[name] = [thing.rstrip(".") for thing in things] + doors

    def _change(self, command: str, text: str) -> None:
        if match := _SWITCHED.fullmatch(text):
            name, state = match.groups()
            if name == "door":  # to where, the command says
                name = command.partition(" ")[2]
            kind = "door" if state in ("open", "closed") else "power"
            self._changed[f"{name} in {self._here}", kind] = state
        elif match := _MOVED.fullmatch(text):
            self._changed.pop((match[1], "place"), None)
            if match[2] != _INVENTORY:
                self._changed[match[1], "place"] = f"moved to {match[2]}"
        elif match := _FOCUSED.fullmatch(text):
            self._changed["focus", ""] = match[1]
        elif match := _CONNECTED.fullmatch(text):
            self._changed[match[1], "wire"] = f"connected to {match[2]}"
        elif match := _DISCONNECTED.fullmatch(text):
            self._disconnect(match[1])
        elif (match := _MEASURED.fullmatch(text)) and (on := _USED_ON.fullmatch(command)):
            self._changed[on[1], "temperature"] = match[1]

    def _disconnect(self, name: str) -> None:
        for (end, kind), word in list(self._changed.items()):
            if kind == "wire" and name in f"{end} {word}":
                del self._changed[end, kind]

    def lists(self) -> dict[str, list[str]]:
        """The four lists of `base.Records`, places in the order in which they were first seen.

        - `seen`: `hallway: a picture; door to the kitchen (open)`; `fridge in kitchen: nothing`.
        - `changed`: `fridge in kitchen: open`; `water: 28 degrees celsius`; `focus: metal pot`.
        - `tried`: `look around: This room is called the hallway.`
        """
        return {
            "seen": [f"{place}: {'; '.join(things)}" for place, things in self._seen.items()],
            "held": list(self._held),
            "changed": [f"{name}: {word}" for (name, _), word in self._changed.items()],
            "tried": list(self._tried),
        }
