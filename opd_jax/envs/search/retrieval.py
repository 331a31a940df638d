"""Passages, and a search engine that runs in this process.

A corpus is a JSONL file in the form of Search-R1's `wiki-18.jsonl`: one passage a line, with `id`
and `contents`, whose first line is the title. Lines with `title` and `text` are read as well.
"""

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_K1, _B = 1.5, 0.75


@dataclass(frozen=True)
class Passage:
    """A piece of text that a search can find.

    Attributes:
      id: unique in its corpus; "" where the corpus gives none.
      title: what it is about.
      text: the rest; may have several lines.
    """

    id: str
    title: str
    text: str

    @property
    def contents(self) -> str:
        """Title and text in the form of a corpus line."""
        return f"{self.title}\n{self.text}"


class RetrievalError(Exception):
    """The search engine did not answer."""


class Retriever(Protocol):
    """Finds passages. Several threads may call it at once.

    Attributes:
      waits: it waits for another process or a server, so threads should call it side by side.
    """

    waits: bool

    def search(self, queries: Sequence[str], *, top: int) -> list[list[Passage]]:
        """For each query at most `top` passages, best first.

        Raises:
          RetrievalError: there is no answer.
        """
        ...


def passage_from(document: Mapping[str, Any]) -> Passage:
    """A passage from a line of a corpus or a server's reply.

    Raises:
      ValueError: it has neither the string `contents` nor the strings `title` and `text`.
    """
    if isinstance(document.get("contents"), str):
        title, _, text = document["contents"].partition("\n")
        title = title.strip().strip('"')
    else:
        title, text = document.get("title"), document.get("text")
        if not isinstance(title, str) or not isinstance(text, str):
            raise ValueError(
                "a passage needs `contents`, or `title` and `text`, as strings; got the fields "
                f"{', '.join(map(str, document)) or 'none'}"
            )
    return Passage(id=str(document.get("id", "")), title=title, text=text)


def read_corpus(path: Path) -> Iterator[Passage]:
    """The passages of a JSONL file in order.

    Raises:
      ValueError: the file is missing, or a line is not a passage; names file and line.
    """
    if not path.is_file():
        raise ValueError(f"`corpus`: no file `{path}`; give a JSONL file with a passage a line")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield passage_from(json.loads(line))
            except (ValueError, AttributeError) as error:
                raise ValueError(f"`corpus`: `{path}`, line {number}: {error}") from None


class BM25:
    """Ranks passages by Lucene's BM25 score.

    score(q, d) = sum over the words w of q: idf(w) * tf / (tf + k1 (1 - b + b |d| / mean |d|))
    idf(w) = ln(1 + (N - n + 0.5) / (n + 0.5))

    Here tf is how often w stands in d, |d| is the number of words in d, N the number of passages,
    and n the number of passages with w. k1 = 1.5 and b = 0.75. Scores are float32.

    A word is a run of two or more letters and digits, in lower case. There are no stop words: one
    may be what is asked for, such as the internet country code ".is". A passage that shares no word
    with the query is never returned. Passages with equal scores come in the order of the corpus, so
    results are the same on every machine.

    Args:
      passages: the corpus, kept in memory.

    Raises:
      ValueError: there are no passages.

    Source: Kamphuis et al., 2020, "Which BM25 Do You Mean?", its Lucene variant (accurate).
    """

    waits = False

    def __init__(self, passages: Sequence[Passage]):
        if not passages:
            raise ValueError("`corpus`: expected at least one passage, got none")
        self.passages = passages
        self._numbers: dict[str, int] = {}
        # One entry for each pair of a word and a passage that holds it.
        words, holders, counts = array("q"), array("q"), array("q")
        lengths = np.zeros(len(passages))
        for holder, passage in enumerate(passages):
            found = _words(passage.contents)
            lengths[holder] = len(found)
            for word, count in Counter(found).items():
                words.append(self._numbers.setdefault(word, len(self._numbers)))
                holders.append(holder)
                counts.append(count)
        word_of, holder_of, tf = map(np.asarray, (words, holders, counts))
        having = np.bincount(word_of, minlength=len(self._numbers))
        idf = np.log(1 + (len(passages) - having + 0.5) / (having + 0.5)).astype(np.float32)
        norm = _K1 * (1 - _B + _B * lengths / (lengths.mean() or 1.0))
        scores = (idf[word_of] * (tf / (tf + norm[holder_of]))).astype(np.float32)
        # Sorted by word: the passages that hold word i are those from start i to start i + 1.
        order = np.argsort(word_of, kind="stable")
        self._holders, self._scores = holder_of[order], scores[order]
        self._starts = np.concatenate([[0], np.cumsum(having)])

    def search(self, queries: Sequence[str], *, top: int) -> list[list[Passage]]:
        """For each query at most `top` passages, best first."""
        return [[p for p, _ in found] for found in self.search_scored(queries, top=top)]

    def search_scored(
        self, queries: Sequence[str], *, top: int
    ) -> list[list[tuple[Passage, float]]]:
        """The same with scores."""
        return [self._best(query, top) for query in queries]

    def _best(self, query: str, top: int) -> list[tuple[Passage, float]]:
        scores = np.zeros(len(self.passages), np.float32)
        for number in map(self._numbers.get, _words(query)):
            if number is not None:
                start, end = self._starts[number : number + 2]
                scores[self._holders[start:end]] += self._scores[start:end]
        least = np.partition(scores, -top)[-top] if top < len(scores) else 0.0
        candidates = np.flatnonzero((scores >= least) & (scores > 0))
        best = candidates[np.argsort(-scores[candidates], kind="stable")][:top]
        return [(self.passages[i], float(scores[i])) for i in best]


def _words(text: str) -> list[str]:
    return re.findall(r"\w\w+", text.lower())


def load_bm25(path: Path) -> BM25:
    """BM25 over a JSONL file; raises as `read_corpus` and `BM25`."""
    return BM25(list(read_corpus(path)))
