"""The seven question sets of the paper's SearchQA, read from a local folder.

The folder has the form in which FlashRAG publishes the sets (Jin et al., 2024, arXiv:2405.13576)
and Search-R1 uses them: a folder for each set, with JSONL files of `id`, `question` and
`golden_answers`. Nothing is downloaded here.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from opd_jax.envs.base import NoTasks
from opd_jax.envs.search.questions import Question, panel
from opd_jax.envs.turns import encodable

# Set -> its evaluation file: `dev` if the published test questions have no answers.
SETS = {
    "nq": "nq/test.jsonl",
    "triviaqa": "triviaqa/test.jsonl",
    "popqa": "popqa/test.jsonl",
    "hotpotqa": "hotpotqa/dev.jsonl",
    "2wikimultihopqa": "2wikimultihopqa/dev.jsonl",
    "musique": "musique/dev.jsonl",
    "bamboogle": "bamboogle/test.jsonl",
}
TRAIN, DEV = "train", "dev"
DEV_SETS = {"nq": "nq/dev.jsonl"}  # neither trained on nor evaluated
# Search-R1's training questions.
TRAIN_SETS = {"nq": "nq/train.jsonl", "hotpotqa": "hotpotqa/train.jsonl"}


def read_questions(folder: Path, name: str, file: str) -> Iterator[Question]:
    """The questions of one file of the set `name`.

    Raises:
      NoTasks: the file is missing.
      ValueError: a line is not a question; names file and line.
    """
    path = folder / file
    if not path.is_file():
        raise NoTasks(
            f"`env.data`: no file `{path}`; put the JSONL files of FlashRAG's datasets under "
            f"`{folder}`, a folder for each set"
        )
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield _question(json.loads(line), name)
                except ValueError as error:
                    raise ValueError(f"`env.data`: `{path}`, line {number}: {error}") from None


def _question(row: object, name: str) -> Question:
    fields = row if isinstance(row, dict) else {}
    text, answers = fields.get("question"), fields.get("golden_answers")
    strings = isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
    if "id" not in fields or not isinstance(text, str) or not answers or not strings:
        raise ValueError(
            "expected `id`, `question` and `golden_answers`, a list of at least one string; got "
            f"{json.dumps(row)[:200]}"
        )
    id = encodable(f"searchqa/{name}/{fields['id']}")
    return Question(id, name, encodable(text.strip()), tuple(map(encodable, answers)))


@cache  # all environments of a process share the questions
def questions(folder: Path, split: str, count: int) -> tuple[Question, ...]:
    """The panel of a split: at most `count` questions of `SETS`, `DEV_SETS` or `TRAIN_SETS`.

    The paper takes at most 500 of each set and does not say which. Here `panel` chooses.

    Raises:
      ValueError: as `read_questions`.
    """
    files = {TRAIN: TRAIN_SETS, DEV: DEV_SETS}.get(split) or {split: SETS[split]}
    found = [q for name, file in files.items() for q in read_questions(folder, name, file)]
    return panel(found, count)
