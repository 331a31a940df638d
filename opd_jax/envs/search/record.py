"""The record of an episode of search (`base.Records`), read from what it says."""

import re

from opd_jax.envs.turns import first_sentence, tried

_INFORMATION = re.compile(r"<information>\n(.*)\n</information>", re.DOTALL)
_DOCUMENT = re.compile(r"^Doc \d+ \(Title: (.*)\)$", re.MULTILINE)


def documents(text: str) -> list[tuple[str, str]]:
    """Title and text of each passage that an observation shows."""
    shown = _INFORMATION.search(text)
    if not shown:
        return []
    _, *parts = _DOCUMENT.split(shown[1])
    return list(zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True))


class Record:
    """The titles of the passages that were shown, and what was searched or answered."""

    def __init__(self) -> None:
        self._titles: dict[str, None] = {}
        self._tried: list[str] = []

    def read(self, action: str, text: str) -> None:
        """Read the answer to an action, which is `search[...]` or `answer[...]`."""
        titles = [title for title, _ in documents(text)]
        self._titles |= dict.fromkeys(titles)
        found = f"{len(titles)} found: {'; '.join(titles)}"
        self._tried.append(tried(action, found if titles else first_sentence(text)))

    def lists(self) -> dict[str, list[str]]:
        """The four lists of `base.Records`; nothing is held, and nothing changes.

        - `seen`: titles, in the order in which they were first shown.
        - `tried`: `search[Marnfeld river]: 2 found: Marnfeld; Ode`; `answer[Tern]: The answer is
          wrong.`
        """
        return {
            "seen": list(self._titles),
            "held": [],
            "changed": [],
            "tried": list(self._tried),
        }
