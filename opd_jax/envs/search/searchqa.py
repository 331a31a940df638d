"""SearchQA, the paper's search benchmark: seven published question sets over a Wikipedia of 2018.

Questions and passages are not part of this package. `data` is a folder with the published files
(`searchqa_data`); `retriever` is the address of a retrieval server, or a JSONL corpus. The paper
searches Wikipedia 2018 with E5 and a flat FAISS index, as Search-R1's server does.
"""

import re
from functools import cache, partial
from pathlib import Path
from typing import Any

from opd_jax.envs.search.env import INVENTED, SearchEnv
from opd_jax.envs.search.retrieval import Retriever, load_bm25
from opd_jax.envs.search.retrieval_client import HttpRetriever
from opd_jax.envs.search.searchqa_data import DEV, SETS, TRAIN, questions
from opd_jax.runtime.files import local_path


@cache  # all environments of a process share the index, or the client that batches their queries
def open_retriever(
    where: str, *, timeout_s: float, retry_minutes: float, wait_s: float, batch: int
) -> Retriever:
    """A client for an `http://` or `https://` address, else BM25 over the JSONL file of that name.

    Args:
      where: address or file name.
      timeout_s, retry_minutes, wait_s, batch: see `HttpRetriever`.

    Raises:
      ValueError: no server answers, or there is no such corpus.
    """
    if not where:
        raise ValueError(
            "`retriever`: expected the address of a retrieval server or a JSONL corpus, got ''"
        )
    if re.match(r"[\w.-]+:\d+(/|$)", where):
        raise ValueError(f"`retriever`: `{where}` is no address and no file; write http://{where}")
    if where.startswith(("http://", "https://")):
        return HttpRetriever(
            where, timeout_s=timeout_s, retry_minutes=retry_minutes, wait_s=wait_s, batch=batch
        )
    return load_bm25(local_path(where, name="retriever"))


def _data_folder(data: str) -> Path:
    folder = local_path(data, name="env.data")
    if not data or not folder.is_dir():
        raise ValueError(
            f"`env.data`: expected a folder with the question files of SearchQA, got {data!r}; "
            "download FlashRAG's datasets and give their folder"
        )
    return folder


class SearchQA(SearchEnv):
    """The published sets as an `Env`, with the splits `train`, `dev` and `searchqa_data.SETS`.

    Args:
      folder: of the question files; read when a split is first used.
      train_questions: most questions in `train`.
      test_questions: most questions in each other split.
      **settings: the arguments of `SearchEnv` other than `panels`.

    Raises:
      ValueError: as `SearchEnv`.
    """

    def __init__(self, *, folder: Path, train_questions: int, test_questions: int, **settings: Any):
        counts = {TRAIN: train_questions, **dict.fromkeys([*SETS, DEV], test_questions)}
        panels = {split: partial(questions, folder, split, n) for split, n in counts.items()}
        super().__init__(panels=panels, **settings)


def open_searchqa(
    *,
    data: str,
    train_questions: int,
    test_questions: int,
    retriever: str,
    timeout_s: float,
    retry_minutes: float,
    wait_s: float,
    batch: int,
    max_turns: int,
    max_searches: int,
    passages: int,
    passage_words: int,
    retry_wrong: bool,
) -> SearchQA:
    """`SearchQA` with the search engine that `retriever` names.

    Args:
      data: folder of the question files.
      train_questions, test_questions: see `SearchQA`.
      retriever, timeout_s, retry_minutes, wait_s, batch: see `open_retriever`.
      max_turns, max_searches, passages, passage_words, retry_wrong: see `SearchEnv`.

    Raises:
      ValueError: `data` is not a folder, or as `open_retriever` or `SearchQA`.
    """
    folder = _data_folder(data)  # before a server that is away is waited for
    engine = open_retriever(
        retriever, timeout_s=timeout_s, retry_minutes=retry_minutes, wait_s=wait_s, batch=batch
    )
    return SearchQA(
        folder=folder,
        train_questions=train_questions,
        test_questions=test_questions,
        retriever=engine,
        max_turns=max_turns,
        max_searches=max_searches,
        passages=passages,
        passage_words=passage_words,
        retry_wrong=retry_wrong,
    )


open_searchqa.world = ("data", "retriever", "timeout_s", "retry_minutes", "wait_s", "batch")  # type: ignore[attr-defined]
open_searchqa.figures = ("test_questions",)  # type: ignore[attr-defined]
open_searchqa.labels_turns = False  # type: ignore[attr-defined]
open_searchqa.invented = INVENTED  # type: ignore[attr-defined]
open_searchqa.record = SearchQA.record  # type: ignore[attr-defined]
