"""The paper's third experiment: SearchQA, Qwen3 students from larger Qwen3 teachers.

    python -m opd_jax.train --config=searchqa_qwen3 --workdir=runs/searchqa \
        --config.env.data=data/searchqa
    python -m opd_jax.evaluate --config=searchqa_qwen3:runlocal --workdir=... \
        --policy=expert

Arguments, and the sweeps that give the paper's tables: see `paper.py`. Models are local folders:
`hf download Qwen/Qwen3-1.7B --local-dir models/Qwen3-1.7B`, and so on for Qwen/Qwen3-8B.

Needs
- questions: FlashRAG's datasets nq, triviaqa, popqa, hotpotqa, 2wikimultihopqa, musique and
  bamboogle, a folder of JSONL files each, in `--config.env.data`;
- passages, from `--config.env.retriever`: the address of a retrieval server such as Search-R1's,
  which serves the paper's Wikipedia of 2018 with E5 and a flat FAISS index; or the path of a JSONL
  corpus, which is searched with BM25 and gives other figures than the paper's.

`runlocal` plays FactbookQA instead: this project's own questions about the CIA World Factbook. It
needs only the extra `searchqa`. Its figures are not SearchQA's, and tables say so.

Success is exact match. Tables also show `f1`, and `macro_average`, the mean over the seven sets.

Hardware: meant for eight accelerators of 80 GB (`mesh`), besides what the retrieval server
takes. We have not run it at this size, so there is no wall time.

The paper's figures (single runs), mean exact match in %: 0.6B from 8B opd 25.46, sage 25.31; 1.7B
from 8B opd 30.09, sage 30.77.
"""

from ml_collections import ConfigDict

from opd_jax.configs.paper import paper_config

PROTOCOL = dict(
    max_turns=16,
    max_searches=8,  # most searches of an episode
    passages=3,  # most passages that a search shows
    passage_words=100,  # longer passages are cut to this
    retry_wrong=False,  # whether an episode goes on after a wrong answer
    workers=False,  # in one process, environments share the index or the server's client
    start_timeout_s=300.0,
    step_timeout_s=240.0,
)
SEARCHQA = PROTOCOL | dict(
    by="searchqa",
    data="",  # folder of the questions
    train_questions=10_000,  # most questions of the training set
    test_questions=500,  # most questions of each other set
    retriever="http://127.0.0.1:8000/retrieve",
    timeout_s=30.0,  # longest wait for an answer of the server
    retry_minutes=10.0,  # the longest outage of the server; after it the run ends with status 75
    wait_s=0.5,  # seconds before the first retry; doubled for each further one, up to 30
    batch=64,  # most queries in a request
)
SETS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of one run, or of a comparison."""
    return paper_config(
        arg,
        env=SEARCHQA,
        splits=SETS,
        tasks=500,
        updates=156,
        local_env=PROTOCOL | dict(by="factbookqa", max_turns=3),
        local_splits=("test",),
    )
