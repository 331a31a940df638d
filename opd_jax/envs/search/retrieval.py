"""Passages, and a search engine that runs in this process.

A corpus is a JSONL file in the form of Search-R1's `wiki-18.jsonl`: one passage a line, with `id`
and `contents`, whose first line is the title. Lines with `title` and `text` are read as well.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from opd_jax.envs.turns import encodable


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
    id = str(document.get("id", ""))
    return Passage(id=encodable(id), title=encodable(title), text=encodable(text))


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
    """Ranks passages by Lucene's BM25 score, as `bm25s` computes it (k1 = 1.5, b = 0.75).

    A word is a run of two or more letters and digits, in lower case. There are no stop words: one
    may be what is asked for, such as the internet country code ".is". A passage that shares no word
    with the query is never returned. Passages with equal scores come in the order of the corpus, so
    results are the same on every machine.

    Args:
      passages: the corpus, kept in memory.

    Raises:
      ValueError: there are no passages, or `bm25s` is not installed.

    Source: Lù, 2024, "BM25S", arXiv:2407.03618.
    """

    waits = False

    def __init__(self, passages: Sequence[Passage]):
        if not passages:
            raise ValueError("`corpus`: expected at least one passage, got none")
        self.passages = passages
        self._bm25s = _import_bm25s()
        self._index = self._bm25s.BM25()
        self._index.index(
            self._words([p.contents for p in passages], return_ids=True), show_progress=False
        )

    def search(self, queries: Sequence[str], *, top: int) -> list[list[Passage]]:
        """For each query at most `top` passages, best first."""
        return [[p for p, _ in found] for found in self.search_scored(queries, top=top)]

    def search_scored(
        self, queries: Sequence[str], *, top: int
    ) -> list[list[tuple[Passage, float]]]:
        """The same with scores."""
        return [self._best(query, top) for query in self._words(queries, return_ids=False)]

    def _words(self, texts: Sequence[str], *, return_ids: bool) -> Any:
        return self._bm25s.tokenize(
            list(texts), stopwords=[], return_ids=return_ids, show_progress=False
        )

    def _best(self, words: list[str], top: int) -> list[tuple[Passage, float]]:
        known = self._index.get_tokens_ids(words)
        if not known:
            return []
        scores = self._index.get_scores_from_ids(known)
        least = np.partition(scores, -top)[-top] if top < len(scores) else 0.0
        candidates = np.flatnonzero((scores >= least) & (scores > 0))
        best = candidates[np.argsort(-scores[candidates], kind="stable")][:top]
        return [(self.passages[i], float(scores[i])) for i in best]


def _import_bm25s() -> Any:
    """`bm25s`, which runs a small program on JAX when it is imported, where JAX is installed.

    That does no harm: a run has set JAX up by then, and workers and the server keep it on the CPU.
    """
    try:
        import bm25s
    except ImportError:
        raise ValueError(
            "BM25 needs the package bm25s, which is not installed: pip install -e '.[searchqa]' in "
            "the repository"
        ) from None
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
    return bm25s


def load_bm25(path: Path) -> BM25:
    """BM25 over a JSONL file; raises as `read_corpus` and `BM25`."""
    return BM25(list(read_corpus(path)))
