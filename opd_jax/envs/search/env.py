"""Questions answered by searching, in the turns of the paper's SearchQA.

A turn is a thought block and an action block, `search[query]` or `answer[text]`. A search shows the
few best passages. An answer ends the episode and is scored by exact match. `searchqa` and
`factbook` supply questions and passages.

Scores are those of Search-R1 (Jin et al., 2025, arXiv:2503.09516). Two things differ from it. The
blocks are the paper's, so that no tag collides with a model's thinking tokens. And the number of
searches has a limit of its own besides the number of turns.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from opd_jax.envs.base import BROKEN, Observation, Task
from opd_jax.envs.search.answers import exact_match, f1
from opd_jax.envs.search.questions import Question, digest
from opd_jax.envs.search.record import Record
from opd_jax.envs.search.retrieval import Passage, RetrievalError, Retriever
from opd_jax.envs.turns import TurnClock, before_invented_turn, invented_turn

SYSTEM = """\
You answer questions by searching a collection of passages. Reply with two blocks:
<thought>what you know, what is missing, what to do next</thought>
<action>search[query]</action>
or, once you know it, with <action>answer[text]</action> as the second. A search shows the %d best \
passages; there are %d searches. %s Answer with a name, number or date alone.

For example, to the question: Which river flows through the birthplace of the clockmaker Ilse \
Brandt?
You: <thought>I need to know where Ilse Brandt was born.</thought>
<action>search[Ilse Brandt clockmaker born]</action>
Result: <information>
Doc 1 (Title: Ilse Brandt)
Ilse Brandt was a clockmaker. She was born in Marnfeld.
</information>
You: <thought>She was born in Marnfeld. I need the river that flows through it.</thought>
<action>search[Marnfeld river]</action>
Result: <information>
Doc 1 (Title: Marnfeld)
Marnfeld is a market town on the river Ode.
</information>
You: <thought>The river at Marnfeld is the Ode.</thought>
<action>answer[Ode]</action>"""
ONE_ANSWER = "Your first answer is final."
MORE_ANSWERS = "After a wrong answer you may go on."

SCENE = "A collection of passages can be searched. Searches left: %d."
QUESTION_LINE = "\nQuestion: "
INFORMATION = "<information>\n%s\n</information>"
DOCUMENT = "Doc %d (Title: %s)\n%s"
SEARCHES_LEFT = "\nSearches left: %d."
RIGHT = "The answer is right."
WRONG = "The answer is wrong."
FAULT = "The search engine failed: %s."

# Why a turn fails, and what the agent is told. A wrong answer is not a failure: the action was
# carried out, and the judge says whether it was a good one.
FAILURES = {
    "empty": "The reply is empty. Write a thought block and an action block.",
    "no_action": (
        "There is no action block. Write <action>search[query]</action> or "
        "<action>answer[text]</action>."
    ),
    "bad_action": "The action is not understood. It must be search[query] or answer[text].",
    "no_argument": "There is nothing between the brackets.",
    "no_searches_left": "There are no searches left. Answer the question.",
    "no_passages": "No passage holds any of these words.",
}

SEARCH, ANSWER = "search", "answer"
ADMISSIBLE = {SEARCH: "search[query]", ANSWER: "answer[text]"}

_BLOCK = re.compile(r"<action>(.*?)</action>", re.DOTALL | re.IGNORECASE)
INVENTED = invented_turn(others=("result", "information"), own=("you",))
_ACTION = re.compile(r"\s*(search|answer)\s*\[(.*)\]\s*", re.DOTALL | re.IGNORECASE)


class Action(NamedTuple):
    """What a response asks for.

    Attributes:
      kind: `SEARCH` or `ANSWER`; "" if there is no action.
      argument: the query or the answer; "" if there is no action.
      failure: why there is none, one of `FAILURES`; "" if there is one.
    """

    kind: str
    argument: str
    failure: str


class Outcome(NamedTuple):
    """The result of an action.

    Attributes:
      text: what the agent is told.
      end, oracle, failure: as in `Observation`; `end` does not know the limit of turns.
    """

    text: str
    end: str = ""
    oracle: str = ""
    failure: str = ""


def parse_response(response: str) -> Action:
    """Find the action in a response.

    Args:
      response: the model's whole text. The first action block counts: whatever follows it was
        written before the model saw the reply. So was an invented reply (`INVENTED`).
    """
    if not response.strip():
        return Action("", "", "empty")
    block = _BLOCK.search(before_invented_turn(response, INVENTED)[0])
    if not block:
        return Action("", "", "no_action")
    action = _ACTION.fullmatch(block[1])
    if not action:
        return Action("", "", "bad_action")
    argument = " ".join(action[2].split())
    return Action(action[1].lower(), argument, "") if argument else Action("", "", "no_argument")


def shorten(text: str, words: int) -> str:
    """The first `words` words of a text, and an ellipsis if more follow."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return text if len(ends) <= words else text[: ends[words - 1]] + " ..."


class SearchEnv:
    """An `Env` over questions and a search engine.

    Args:
      panels: for each split a function that returns its questions.
      retriever: the search engine; environments may share one.
      max_turns: an episode ends after this many responses.
      max_searches: an episode may search this often; further searches fail.
      passages: a search shows at most this many.
      passage_words: a longer passage is cut to this many words.
      retry_wrong: a wrong answer does not end the episode. The agent then learns that it is wrong,
        which the paper's protocol does not tell it.

    Raises:
      ValueError: one of the numbers is below 1.
    """

    task: Task
    invented = INVENTED

    def __init__(
        self,
        *,
        panels: Mapping[str, Callable[[], Sequence[Question]]],
        retriever: Retriever,
        max_turns: int,
        max_searches: int,
        passages: int,
        passage_words: int,
        retry_wrong: bool,
    ):
        self._clock = TurnClock(max_turns)
        numbers = {
            "max_searches": max_searches,
            "passages": passages,
            "passage_words": passage_words,
        }
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1; got {number}.")
        self.system = SYSTEM % (passages, max_searches, MORE_ANSWERS if retry_wrong else ONE_ANSWER)
        self._panels = panels
        self._retriever = retriever
        self.waits = retriever.waits
        self._max_searches = max_searches
        self._passages, self._passage_words = passages, passage_words
        self._retry_wrong = retry_wrong

    def size(self, split: str) -> int:
        """Number of questions in `split`; ValueError naming the known splits otherwise."""
        return len(self._panel(split))

    def digest(self, split: str) -> str:
        """SHA-256 over the questions of `split`."""
        return digest(self._panel(split))

    def reset(self, split: str, index: int) -> Observation:
        """Start question `index` of `split`; ValueError if there is none."""
        panel = self._panel(split)
        if not 0 <= index < len(panel):
            raise ValueError(
                f"`index` of split {split!r}: expected 0..{len(panel) - 1}; got {index}."
            )
        question = panel[index]
        self._question = question
        self._clock.start()
        self._searches = 0
        self._queries: set[str] = set()
        self._seen: set[str] = set()
        self._record = Record()
        self._f1 = 0.0
        scene = SCENE % self._max_searches
        self.task = Task(id=question.id, type=question.type, goal=question.text, scene=scene)
        message = scene + QUESTION_LINE + question.text
        return Observation(scene, message, self._admissible(), measures={"f1": 0.0})

    def step(self, response: str) -> Observation:
        """Act on the model's whole response text.

        A failed response (see `FAILURES`) costs a turn; a search that finds nothing also costs a
        search. If the search engine does not answer this query, the episode ends as `BROKEN`, since
        that is not the agent's doing.

        Raises:
          ValueError: if there is no running episode.
          WorldFailed: the search engine answers no query.
        """
        self._clock.tick()
        action = parse_response(response)
        outcome = self._carry_out(action)
        text = outcome.text
        command = f"{action.kind}[{action.argument}]" if action.kind else ""
        if command:
            self._record.read(command, text)
        if action.kind == SEARCH and not outcome.end:
            text += SEARCHES_LEFT % (self._max_searches - self._searches)
        end = self._clock.end(outcome.end)
        return Observation(
            text=text,
            message=text,
            admissible=self._admissible(),
            end=end,
            score=1.0 if end == "success" else 0.0,
            action=command,
            failure=outcome.failure,
            oracle=outcome.oracle,
            measures={"f1": self._f1},
        )

    def record(self) -> Mapping[str, Sequence[str]]:
        """What the agent may know of this episode (`base.Records`)."""
        return self._record.lists()

    def _panel(self, split: str) -> Sequence[Question]:
        if split not in self._panels:
            known = ", ".join(self._panels)
            raise ValueError(f"`split`: expected one of {known}; got {split!r}.")
        return self._panels[split]()

    def _admissible(self) -> tuple[str, ...]:
        if self._searches < self._max_searches:
            return ADMISSIBLE[SEARCH], ADMISSIBLE[ANSWER]
        return (ADMISSIBLE[ANSWER],)

    def _carry_out(self, action: Action) -> Outcome:
        if action.kind == ANSWER:
            return self._answer(action.argument)
        if action.kind == SEARCH:
            return self._search(action.argument)
        return _failed(action.failure)

    def _answer(self, answer: str) -> Outcome:
        accepted = self._question.answers
        right = exact_match(answer, accepted)
        self._f1 = f1(answer, accepted)
        oracle = ("SKIP" if right else "STRONG") if self._question.supporting else ""
        if right:
            return Outcome(RIGHT, "success", oracle)
        return Outcome(WRONG, "" if self._retry_wrong else "wrong_answer", oracle)

    def _search(self, query: str) -> Outcome:
        if self._searches >= self._max_searches:
            return _failed("no_searches_left")
        self._searches += 1
        try:
            (found,) = self._retriever.search([query], top=self._passages)
        except RetrievalError as error:
            return Outcome(FAULT % error, BROKEN)
        if not found:
            return _failed("no_passages")
        documents = [
            DOCUMENT % (number, p.title, shorten(p.text, self._passage_words))
            for number, p in enumerate(found, start=1)
        ]
        return Outcome(INFORMATION % "\n".join(documents), oracle=self._label(query, found))

    def _label(self, query: str, found: Sequence[Passage]) -> str:
        """The label of a search; "" if the needed passages are not recorded.

        SKIP if it shows a needed passage for the first time. Otherwise STRONG if all had been seen
        or the query is a repetition, else WEAK.
        """
        needed = set(self._question.supporting)
        missing = needed - self._seen
        repeated = query.lower() in self._queries
        self._queries.add(query.lower())
        self._seen.update(passage.id for passage in found)
        if not needed:
            return ""
        if missing & self._seen:
            return "SKIP"
        return "STRONG" if repeated or not missing else "WEAK"


def _failed(failure: str) -> Outcome:
    return Outcome(FAILURES[failure], failure=failure)
