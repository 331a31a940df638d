"""Splits a command line into (name, text) pairs, and reads texts as typed values."""

import ast
import contextlib
import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

_BOOLS = {"true": True, "1": True, "false": False, "0": False}


def flag_pairs(argv: Sequence[str], *, switches: Collection[str] = ()) -> list[tuple[str, str]]:
    """Splits ``--name=value`` and ``--name value`` words into (name, value) pairs.

    A name in `switches` stands alone for ``--name=true``.
    """
    pairs = []
    words = iter(argv)
    for word in words:
        if not word.startswith("--") or word == "--":
            raise ValueError(f"expected a flag `--name=value`, got `{word}`; see --help")
        name, equals, text = word[2:].partition("=")
        if not equals and name in switches:
            text = "true"
        elif not equals:
            text = next(words, "--")
            if text.startswith("--"):
                raise ValueError(f"flag `--{name}` needs a value: write `--{name}=value`")
        pairs.append((name, text))
    return pairs


def given_fields(argv: Sequence[str]) -> list[str]:
    """Names of the config fields that a command line replaces."""
    prefix = "--config."
    return [word.removeprefix(prefix).partition("=")[0] for word in argv if word[:9] == prefix]


def read_value(text: str, kind: type, name: str) -> Any:
    """Reads `text` as a bool, int, float or string."""
    try:
        if kind is bool:
            return _BOOLS[text.strip().lower()]
        if kind is int:
            return int(text)
        if kind is float and math.isfinite(float(text)):
            return float(text)
        if kind is str:
            return text
    except (KeyError, ValueError):
        pass
    expected = {bool: "bool (true or false)", int: "int", float: "finite float"}.get(kind)
    if expected is None:
        raise ValueError(f"{name} holds a {kind.__name__}, which cannot be set from a command line")
    raise ValueError(f"{name} expects {expected}, got `{text}`")


def read_sequence(text: str, default: tuple | list, name: str) -> tuple | list:
    """Reads ``1,2,3``, ``(1,2,3)`` or ``('a', 'b')``; elements have the type of the default's."""
    body = text.strip()
    quoted = None
    if body[:1] + body[-1:] in ("()", "[]"):
        quoted, body = _guess(body), body[1:-1]
    parts = [part.strip() for part in body.split(",") if part.strip()]
    strings = isinstance(quoted, (tuple, list)) and all(isinstance(x, str) for x in quoted)
    if quoted and strings:
        parts = list(quoted)
    kinds = {type(element) for element in default}
    if len(kinds) > 1:
        raise ValueError(
            f"{name} mixes types in {default!r} and cannot be set from a command line; "
            "change the config file"
        )
    kind = kinds.pop() if kinds else None
    guess = (lambda part: part) if strings else _guess
    values = [read_value(part, kind, name) if kind else guess(part) for part in parts]
    return type(default)(values)


def written(value: Any) -> str | None:
    """A value as text that is read back as the same value; None if no text is."""
    if isinstance(value, Mapping):
        return None
    if not isinstance(value, (tuple, list)):
        return str(value)
    for text in (",".join(map(str, value)), repr(tuple(value))):
        with contextlib.suppress(ValueError):  # elements of several types, or none that are read
            if list(read_sequence(text, value, "")) == list(value):
                return text
    return None


def read_optional(text: str, kind: type, name: str) -> Any:
    """Reads a value for a field whose default is None; guesses the type if `kind` is NoneType."""
    if text.strip().lower() == "none":
        return None
    return _guess(text) if kind is type(None) else read_value(text, kind, name)


def _guess(text: str) -> Any:
    """Reads a Python literal; other text stays as it is."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text


def closest(name: str, names: Sequence[str], *, shown: Callable[[str], str] = str) -> str:
    """Names up to three of `names` that are like `name`, or share its last part, for an error.

    `shown` gives the text that names one of them.
    """
    last = name.rpartition(".")[2]
    by_last = [other for other in names if other.rpartition(".")[2] == last]
    near = by_last + difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    near = list(dict.fromkeys(near))[:3]
    return "; closest: " + ", ".join(f"`{shown(other)}`" for other in near) if near else ""
