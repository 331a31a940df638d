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
- passages: a retrieval server at `--config.env.retriever`, such as Search-R1's, which serves the
  paper's Wikipedia of 2018 with E5 and a flat FAISS index; or the name of a JSONL corpus, which is
  then searched with BM25 and gives other figures than the paper's.

`runlocal` plays FactbookQA instead, which needs nothing but the extra `searchqa`: questions of this
project's own, over the CIA World Factbook. Its figures are not SearchQA's, and tables say so.

Success is exact match, `f1` stands beside it, and `macro_average` is the mean over the seven sets.

Hardware: meant for eight accelerators of 80 GB (`mesh.fsdp`), besides what the retrieval server
takes. It has not been run at this size by us; there is no wall time to give.

Expected are the paper's figures (single runs), the mean exact match in % of opd and of sage: 0.6B
from 8B 25.46 and 25.31, 1.7B from 8B 30.09 and 30.77.
"""

from ml_collections import ConfigDict

from opd_jax.configs.paper import paper_config

# In this process: environments share an index, or a client of the server.
PROTOCOL = dict(
    max_turns=16,
    max_searches=8,
    passages=3,
    passage_words=100,
    retry_wrong=False,
    workers=False,
    start_timeout_s=300.0,
    step_timeout_s=240.0,
)
SEARCHQA = PROTOCOL | dict(
    by="searchqa",
    data="",
    train_questions=10_000,
    test_questions=500,
    retriever="http://127.0.0.1:8000/retrieve",
    timeout_s=30.0,
    retries=3,
    wait_s=0.5,
    batch=64,
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
