"""Episodes as one HTML page that opens without a network.

Each episode is a JSON element of its own, and is parsed when it is chosen. So a page of many
megabytes opens at once. `viewer.html`, `viewer.css` and `viewer.js` lie beside this file.
"""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from opd_jax.runtime.exits import reading

LIMIT_BYTES = 20 * 10**6

# What the page shows of an episode, and of each of the student's tokens.
_SHOWN = ("messages", "task", "end", "score", "measures", "z", "turns")
_COLUMNS = (
    *("text", "student_logprob", "teacher_logprob"),
    *("divergence", "weight", "agrees", "top"),
)
_ASSETS = ("html", "css", "js")

_TYPES = {
    **dict.fromkeys(("task", "measures", "tokens", "student_tokens"), dict),
    **{"turns": list, "who": str, "end": str, "update": int},
}
_TURN_TYPES = {
    **dict.fromkeys(("verdict", "label", "action", "failure", "aside"), str),
    "judge": dict,
}
_NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
      html: its text.
      shown: number of episodes in it.
      left_out: a sentence that says what the limit left out; "" if nothing.
    """

    html: str
    shown: int
    left_out: str


def read_episodes(path: Path) -> list[dict[str, Any]]:
    """The episodes of a file of JSON lines.

    A number that is not finite is read as its name, since JSON has no other way to write it.

    Raises:
      ValueError: a line holds no episode. The message names the line.
      WorldFailed: the file cannot be read now.
    """
    try:
        with reading(path):
            lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise ValueError(f"`{path}` does not exist; give an episode file, or a workdir") from None
    except UnicodeDecodeError:
        raise ValueError(f"`{path}` is not a text file; give an episode file (.jsonl)") from None
    episodes = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            episode = json.loads(line, parse_constant=str)
            _check(episode)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`{path}`, line {number}: {error}; expected an episode") from None
        episodes.append(episode)
    return episodes


def _check(episode: Any) -> None:
    """Raises ValueError where the page could not be drawn."""
    if not isinstance(episode, dict) or not isinstance(episode.get("messages"), list):
        raise ValueError("not an object with a list `messages`")
    _check_types(episode, _TYPES, "")
    for message in episode["messages"]:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError("a message without `role` and `content`")
        _check_types(message, dict.fromkeys(("role", "content"), str), "messages.")
    for turn in episode.get("turns") or []:
        if not isinstance(turn, dict):
            raise ValueError("`turns` is not a list of objects")
        _check_types(turn, _TURN_TYPES, "turns.")
    if columns := episode.get("student_tokens"):
        _check_columns(columns, episode.get("tokens") or {})


def _check_types(found: Mapping[str, Any], types: Mapping[str, type], where: str) -> None:
    for name, kind in types.items():
        value = found.get(name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"`{where}{name}` is {json.dumps(value)[:40]}, not {_NAMES[kind]}")


def _check_columns(columns: Mapping[str, Any], tokens: Mapping[str, Any]) -> None:
    for section, known in (("student_tokens", columns), ("tokens", tokens)):
        _check_types(known, dict.fromkeys(known, list), f"{section}.")
        if len({len(column) for column in known.values()}) > 1:
            lengths = ", ".join(f"{name}: {len(column)}" for name, column in known.items())
            raise ValueError(f"the columns of `{section}` differ in length: {lengths}")
    if not {"position", "text"} <= columns.keys():
        raise ValueError("`student_tokens` needs the columns `position` and `text`")
    if not all(isinstance(text, str) for text in columns["text"]):
        raise ValueError("`student_tokens.text` holds what is no text")
    turns = range(len(tokens.get("turn", ())))
    if any(position not in turns for position in columns["position"]):
        raise ValueError(
            f"`student_tokens.position` lies outside `tokens.turn`, which has {len(turns)}"
        )


def make_page(
    episodes: Sequence[Mapping[str, Any]], *, title: str, limit_bytes: int = LIMIT_BYTES
) -> Page:
    """One page of the episodes.

    Where they do not fit, top fives are left out first. Then whole episodes are, of the earliest
    updates first and of one update the last first.

    Args:
      episodes: as `read_episodes` gives them.
      title: the page's name.
      limit_bytes: the largest page.

    Raises:
      ValueError: there is no episode, or none fits.
    """
    if not episodes:
        raise ValueError(f"{title} holds no episode")
    texts = [_texts(episode) for episode in episodes]
    folder = files(__package__)
    assets = {end: folder.joinpath(f"viewer.{end}").read_text("utf-8") for end in _ASSETS}
    # The rest is for the title, which stands in several places, and for what is left out.
    room = limit_bytes - len("".join(assets.values()).encode()) - 24 * len(title) - 4096
    order = sorted(range(len(episodes)), key=lambda k: -_update(episodes[k]))
    chosen = _fit(texts, order, room)
    if not chosen:
        smallest = min(len(whole_or_lean[-1]) for whole_or_lean in texts)
        raise ValueError(
            f"no episode of {title} fits in {limit_bytes / 1e6:g} MB: the smallest has "
            f"{smallest / 1e6:.1f} MB; give a file of shorter ones"
        )
    left_out = _left_out(episodes, chosen, limit_bytes)
    kept = [episodes[k] for k in sorted(chosen)]
    index = {
        "title": title,
        "left_out": left_out,
        **_scales(kept),
        "episodes": [_entry(episodes[k], without_top=chosen[k] > 0) for k in sorted(chosen)],
    }
    data = [_element("index", _json(index))]
    data += [_element(f"episode-{n}", texts[k][chosen[k]]) for n, k in enumerate(sorted(chosen))]
    page = assets["html"].replace("{{title}}", html.escape(title))
    page = page.replace("{{style}}", assets["css"]).replace("{{script}}", assets["js"])
    before, _, after = page.partition("{{data}}")
    return Page("".join([before, *data, after]), len(chosen), left_out)


def _json(value: Any) -> str:
    """JSON that may stand in an HTML element: without `<`, and ASCII, so without U+2028."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _element(name: str, text: str) -> str:
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def _texts(episode: Mapping[str, Any]) -> list[str]:
    """The episode as JSON; a second time without its top fives if it has any."""
    shown = {name: episode[name] for name in _SHOWN if name in episode}
    if not (columns := episode.get("student_tokens")):
        return [_json(shown)]
    tokens = {name: columns[name] for name in _COLUMNS if name in columns}
    for name in ("turn", "sampled_logprob"):
        if whole := episode["tokens"].get(name):
            tokens[name] = [whole[position] for position in columns["position"]]
    texts = [_json({**shown, "tokens": tokens})]
    if tokens.pop("top", None):
        texts.append(_json({**shown, "tokens": tokens}))
    return texts


def _update(episode: Mapping[str, Any]) -> int:
    return episode.get("update") or 0


def _fit(texts: Sequence[Sequence[str]], order: Iterable[int], room: int) -> dict[int, int]:
    """Episode to the index of its text: 0 is whole. Episodes that do not fit are left out."""
    entry = 512  # of the list, and the element's tags
    chosen: dict[int, int] = {}
    for k in order:
        if (size := len(texts[k][-1]) + entry) <= room:
            chosen[k] = len(texts[k]) - 1
            room -= size
    for k, lean in chosen.items():
        if lean and (more := len(texts[k][0]) - len(texts[k][-1])) <= room:
            chosen[k] = 0
            room -= more
    return chosen


def _left_out(
    episodes: Sequence[Mapping[str, Any]], chosen: Mapping[int, int], limit_bytes: int
) -> str:
    parts = []
    if missing := [_update(e) for k, e in enumerate(episodes) if k not in chosen]:
        first, last = min(missing), max(missing)
        of = f"of update {first}" if first == last else f"of updates {first} to {last}"
        parts.append(f"{len(missing)} of {len(episodes)} episodes, {of}")
    if lean := sum(which > 0 for which in chosen.values()):
        parts.append(f"the top five tokens of {lean} of the episodes shown")
    if not parts:
        return ""
    return f"Left out, to stay within {limit_bytes / 1e6:g} MB: {'; '.join(parts)}."


def _entry(episode: Mapping[str, Any], *, without_top: bool) -> dict[str, Any]:
    """What the list says of an episode, and what it is filtered by."""
    task, turns = episode.get("task") or {}, episode.get("turns") or []
    count = sum(message["role"] == "assistant" for message in episode["messages"])
    verdicts = [turn["verdict"] for turn in turns if turn.get("verdict")]
    entry = {
        "title": str(task.get("kind") or task.get("id") or _first_words(episode))[:120],
        "who": episode.get("who"),
        "update": episode.get("update"),
        "success": episode.get("success"),
        "turns": count,
        "failures": sum(bool(turn.get("failure")) for turn in turns),
        "verdicts": sorted(set(verdicts)),
        "without_top": without_top or None,
    }
    return {name: value for name, value in entry.items() if value is not None}


def _first_words(episode: Mapping[str, Any]) -> str:
    said = [m["content"] for m in episode["messages"] if m["role"] != "system"]
    return " ".join("".join(said[:1]).split())[:60] or "empty"


def _scales(episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where each colour scale ends, and which of them have values below 0.

    One scale serves the whole page, so that episodes can be compared. 2 % of the tokens may lie
    beyond its end.
    """
    values: dict[str, list[float]] = {"divergence": [], "weight": [], "log_ratio": []}
    for episode in episodes:
        columns = episode.get("student_tokens") or {}
        for name in ("divergence", "weight"):
            values[name] += _finite(columns.get(name, ()))
        pairs = zip(
            columns.get("student_logprob", ()), columns.get("teacher_logprob", ()), strict=False
        )
        values["log_ratio"] += [a - b for a, b in pairs if len(_finite((a, b))) == 2]
    ends = {name: sorted(map(abs, found)) for name, found in values.items()}
    return {
        "scales": {name: _round_up(e[int(0.98 * (len(e) - 1))]) for name, e in ends.items() if e},
        "signed": [name for name, found in values.items() if min(found, default=0) < -1e-6],
    }


def _finite(values: Iterable[Any]) -> list[float]:
    return [value for value in values if isinstance(value, (int, float))]


def _round_up(x: float) -> float:
    """The next of 1, 2, 5, 10, 20, … in its power of ten."""
    if x <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(x))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= x * (1 - 1e-9))
