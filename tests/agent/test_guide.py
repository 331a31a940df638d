"""The teacher in the student's episodes: which turns it takes, and what of them is learnt."""

import dataclasses
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import chain, one_layer
from small_agent import DECODING, household_agent, with_decoding
from words import word_tokenizer

from opd_jax import model
from opd_jax.agent.agent import Agent
from opd_jax.agent.chat import ChatFormat
from opd_jax.agent.conversation import Actor, Conversation, Turn
from opd_jax.agent.guide import Guide, has_failed
from opd_jax.agent.positions import Positions
from opd_jax.agent.rollout import beginning, rollout, row_keys
from opd_jax.envs.base import Observation, Task
from opd_jax.envs.household.env import Household
from opd_jax.judge.labels import actors, env_labels
from opd_jax.losses import NO_TURN
from opd_jax.report.episodes import episode
from opd_jax.report.update import episode_metrics

pytestmark = pytest.mark.usefixtures("compile_quickly")

S, T, R = Actor.STUDENT, Actor.TEACHER, Actor.REPLAY


def wrote(conversation: Conversation) -> str:
    return "".join("STR"[turn.actor] for turn in conversation.turns)


def provenance(conversation: Conversation) -> str:
    return "".join("." if turn == NO_TURN else str(turn) for turn in conversation.turn_id)


# --- Forced models and a scripted environment ---------------------------------------------------

WORDS = ["<unk>", "<system>", "<user>", "<end>", "act", "bell", "ring", "pull", "echo", "stop"]
WORDS += ["lamp", "blow", "fine", "dusk"]
# What each says after a word. The student rings at every bell, and the teacher pulls.
STUDENT = {"bell": "ring", "echo": "stop", "lamp": "blow", "dusk": "blow"}
TEACHER = STUDENT | {"bell": "pull"}
# Response -> what the environment answers, and its failure.
REPLIES = {
    "ring": ("bell", "refused"),
    "pull": ("echo", ""),
    "stop": ("fine", ""),
    "blow": ("dusk", ""),
}


class Scripted:
    """Task n starts with the n-th opening; "fine" ends an episode with success."""

    system = "act"
    waits = False

    def __init__(self, openings: Sequence[str], replies: Mapping[str, tuple[str, str]]):
        self.openings, self.replies = openings, replies

    def size(self, split: str) -> int:
        return len(self.openings)

    def reset(self, split: str, index: int) -> Observation:
        text = self.openings[index]
        self.task = Task(id=f"{split}/{index}", type="scripted", goal="none", scene=text)
        return Observation(text, text, ())

    def step(self, response: str) -> Observation:
        text, failure = self.replies[response]
        end = "success" if text == "fine" else ""
        return Observation(text, text, (), end, 0.0, action=response, failure=failure)


def forced(says: Mapping[str, str]) -> tuple[Agent, model.Params]:
    tokenizer = word_tokenizer(WORDS)
    following = says | dict.fromkeys(says.values(), "<end>")
    pairs = {WORDS.index(word): WORDS.index(then) for word, then in following.items()}
    config, params = chain(len(WORDS), pairs, logit=4.0)
    decoding = dataclasses.replace(
        DECODING, temperature=0.0, turn_tokens=3, context_tokens=40, extend_widths=(4,), chunk=2
    )
    return Agent(config, tokenizer, ChatFormat.from_tokenizer(tokenizer), decoding), params


def play_script(
    *openings: str,
    guided: Mapping[str, Any] | None = None,
    replies: Mapping[str, tuple[str, str]] = REPLIES,
    **how: Any,
) -> list[Conversation]:
    """An episode of each opening, of at most five turns."""
    agent, params = forced(STUDENT)
    guide = None
    if guided is not None:
        there, teacher = forced(TEACHER)
        guide = Guide(teacher, there, **(dict(share=0.0, after=0, learnt=True) | guided))
    number = len(openings)
    return rollout(
        params,
        row_keys(jax.random.key(0), range(number)),
        agent=agent,
        envs=[Scripted(openings, replies) for _ in range(2)],
        tasks=[("any", n) for n in range(number)],
        depth=5,
        guide=guide,
        **how,
    )


# The first failures are the student's; then the teacher pulls, and plays to the end.
TAKEN_OVER = {0: ("SSSSS", "depth"), 1: ("STT", "success"), 2: ("SSTT", "success")}
TAKEN_OVER |= {4: ("SSSST", "depth"), 9: ("SSSSS", "depth")}


@pytest.mark.parametrize("after", TAKEN_OVER)
def test_the_teacher_takes_over_after_so_many_failures_in_a_row(after: int) -> None:
    (played, other) = play_script("bell", "lamp", guided={"after": after})
    assert (wrote(played), played.end) == TAKEN_OVER[after]
    assert wrote(other) == "SSSSS"  # nothing fails there


def test_a_conversation_that_is_taken_over_by_hand() -> None:
    golden = "<system> act <user> bell ring <end> <user> bell pull <end> <user> echo stop <end>"
    for learnt, turns in ((True, "....00..11..22"), (False, "....00........")):
        (played,) = play_script("bell", guided={"after": 1, "learnt": learnt})
        assert [WORDS[token] for token in played.tokens] == golden.split()
        assert provenance(played) == turns
        assert wrote(played) == "STT"
        # Whoever wrote a token, it was sampled with that log-probability.
        sampled = [p for span in played.spans for p in range(*span)]
        expected = -np.log1p((len(WORDS) - 1) * np.exp(-4.0))
        np.testing.assert_allclose(np.array(played.logprobs)[sampled], expected, atol=1e-5)


def test_what_the_teacher_reads_is_counted_apart() -> None:
    positions = Positions()
    play_script("bell", guided={"after": 1}, positions=positions)
    # The last token of a context is given to the sampler. So the student reads 3 of its 4, and the
    # teacher first 7 of 8, then its own <end> and the <user> behind it.
    counted = {what: positions.tokens(what) for what in ("reading", "reading_by_teacher")}
    assert counted == {"reading": 3, "reading_by_teacher": 9}
    assert positions.tokens("sampling") == 2 + 4


def test_what_is_told_of_turns_that_the_teacher_took() -> None:
    (played,) = play_script("bell", guided={"after": 1, "learnt": False})
    lost = dataclasses.replace(played, end="broken")
    np.testing.assert_array_equal(actors([played, lost], max_turns=4), [[S, T, T, S], [S, T, T, S]])
    # Nothing is asked about a turn that is not learnt from.
    labels = env_labels([played], max_turns=4)
    assert labels.played.tolist() == [[True, False, False, False]]
    metrics = episode_metrics([played, lost], [played, lost])
    assert metrics["batch/by_teacher"] == (2, 3)
    assert metrics["batch/replayed"] == (0, 3)
    assert metrics["tokens/by_teacher"] == 4
    assert metrics["tokens/sampled"] == 2
    line = episode(played, who="train", update=0, actor="student", decode=str)
    assert [turn["actor"] for turn in line["turns"]] == ["student", "teacher", "teacher"]
    assert line["student_tokens"]["position"] == [4, 5]


def turns_of(failures: str) -> list[Turn]:
    return [Turn("", (), "", "", "", "refused" if f == "F" else "", "", "") for f in failures]


@pytest.mark.parametrize("failures", ["", "F", ".F", "F.F", "FF", "F.FF.", ".FFF", "FF.FFF."])
def test_failures_in_a_row(failures: str) -> None:
    for times in range(1, 5):
        found = has_failed(turns_of(failures), times=times)
        assert found == bool(re.search(f"F{{{times}}}", failures))
    assert not has_failed(turns_of(failures), times=0)


def test_failures_that_are_replayed_do_not_count() -> None:
    replayed = [dataclasses.replace(turn, actor=R) for turn in turns_of("FFF")]
    assert not has_failed([*replayed, *turns_of("F")], times=2)
    assert has_failed([*replayed, *turns_of("FF")], times=2)
    (whole,) = play_script("bell")
    (played,) = play_script("bell", replay=[beginning(whole, turns=2)], guided={"after": 2})
    assert wrote(played) == "RRSST"


# Here the student goes back and forth between two failures, or repeats what is accepted.
CUT = REPLIES | {"blow": ("bell", "refused"), "ring": ("lamp", "refused"), "stop": ("echo", "")}


def test_an_episode_is_cut_at_the_first_failure_that_repeats_an_action() -> None:
    whole = play_script("bell", "lamp", "echo")
    cut = play_script("bell", "lamp", "echo", cut_repeated_failure=True)
    assert [(wrote(c), c.end) for c in cut] == [("SS", "cut"), ("SSSSS", "depth"), ("S", "success")]
    assert cut[0].turns == whole[0].turns[:2]
    assert cut[0].tokens == whole[0].tokens[: len(cut[0].tokens)]
    assert provenance(cut[0])[-1] == "1"  # it ends with its last response
    assert cut[1:] == whole[1:]
    others = play_script("bell", "echo", replies=CUT, cut_repeated_failure=True)
    assert [(wrote(c), c.end) for c in others] == [("SSSSS", "depth")] * 2


def test_replayed_turns_are_not_cut() -> None:
    (whole,) = play_script("bell")
    (played,) = play_script("bell", replay=[beginning(whole, turns=3)], cut_repeated_failure=True)
    assert (wrote(played), played.end) == ("RRRS", "cut")
    # A teacher's turns are.
    (taken,) = play_script(
        "bell",
        guided={"after": 1},
        replies=REPLIES | {"pull": ("bell", "refused")},
        cut_repeated_failure=True,
    )
    assert (wrote(taken), taken.end) == ("STT", "cut")


# --- Random models in a household ---------------------------------------------------------------

ROWS, MAX_TURNS = 3, 4
TASKS = [("train", 3), ("valid_seen", 5), ("train", 8), ("train", 40), ("train", 41)]


@pytest.fixture(scope="module")
def agent() -> Agent:
    made = household_agent(context_tokens=160, extend_widths=(16, 32), chunk=5)
    # A random model samples any token; here a special one is like the others.
    return dataclasses.replace(made, chat=dataclasses.replace(made.chat, turn_marks=frozenset()))


@pytest.fixture(scope="module")
def there(agent: Agent) -> Agent:
    """The teacher as it plays: another model, with the student's tokens."""
    return dataclasses.replace(agent, model=one_layer(agent.model.vocab_size, width=24))


Pair = dict[Actor, tuple[Agent, model.Params]]


@pytest.fixture(scope="module")
def pair(agent: Agent, there: Agent, random_params: Callable) -> Pair:
    made = {}
    for actor, who in ((S, agent), (T, there)):
        params = random_params(who.model, seed=4 + actor)
        params["embed"][:, 0] = 2
        params["final_norm"][0] = 1
        params["head"][0, agent.chat.stop_ids[0]] = 4.0  # some turns end by themselves
        made[actor] = who, jax.tree.map(jnp.asarray, params)
    return made


def play(
    pair: Pair,
    *,
    share: float | None = None,
    learnt: bool = True,
    player: Actor = S,
    numbers: Sequence[int] = range(len(TASKS)),
    kind: type[Household] = Household,
    **decoding: Any,
) -> list[Conversation]:
    """The episodes with these numbers; `share` None: nobody guides."""
    agent, params = pair[player]
    there, teacher = pair[T]
    guide = None
    if share is not None:
        guide = Guide(teacher, with_decoding(there, **decoding), share, after=0, learnt=learnt)
    return rollout(
        params,
        row_keys(jax.random.key(1), numbers),
        agent=with_decoding(agent, **decoding),
        envs=[kind(size="small", max_turns=MAX_TURNS, show_admissible=2) for _ in range(ROWS)],
        tasks=[TASKS[n] for n in numbers],
        depth=0,
        guide=guide,
    )


def as_students(conversation: Conversation) -> Conversation:
    """The conversation as if the one who plays had written all turns."""
    turns = [dataclasses.replace(turn, actor=S) for turn in conversation.turns]
    return dataclasses.replace(conversation, turns=turns)


@pytest.fixture(scope="module")
def mixed(pair: Pair) -> list[Conversation]:
    return play(pair, share=0.5)


def test_a_teacher_without_a_share_changes_no_bit(pair: Pair) -> None:
    assert play(pair, share=0.0) == play(pair)


def test_with_all_turns_the_teachers_an_episode_is_the_teachers_own(pair: Pair) -> None:
    guided, own = play(pair, share=1.0), play(pair, player=T)
    assert set("".join(map(wrote, guided))) == {"T"}
    assert [as_students(c) for c in guided] == own
    assert own != play(pair)
    given = play(pair, share=1.0, learnt=False)
    assert [c.tokens for c in given] == [c.tokens for c in own]
    assert {turn for c in given for turn in c.turn_id} == {NO_TURN}


def test_a_turn_is_drawn_by_the_episodes_key_and_the_turn(mixed: list[Conversation]) -> None:
    keys = row_keys(jax.random.key(1), range(len(TASKS)))
    for key, conversation in zip(keys, mixed, strict=True):
        for turn, played in enumerate(conversation.turns):
            folded = jax.random.fold_in(jax.random.fold_in(key, turn), np.uint32(2**32 - 1))
            expected = T if jax.random.uniform(folded) < 0.5 else S
            assert played.actor is expected
    written = "".join(map(wrote, mixed))
    assert {written.count("S") > 4, written.count("T") > 4} == {True}
    assert len(set(map(wrote, mixed))) > 1


@pytest.mark.parametrize("history_turns", [0, 1])
def test_each_turn_is_sampled_from_its_own_writer(pair: Pair, history_turns: int) -> None:
    """What was sampled, turn by turn, against a forward of the model that wrote it."""
    played = play(pair, share=0.5, history_turns=history_turns)
    for actor, (agent, params) in pair.items():
        shown = with_decoding(agent, history_turns=history_turns)
        forward = jax.jit(partial(model.forward, config=agent.model, query_chunk=64, remat="none"))
        errors = []
        for c in played:
            for k, (turn, (start, end)) in enumerate(zip(c.turns, c.spans, strict=True)):
                if turn.actor is not actor:
                    continue
                context, response = shown.context(c, k), c.tokens[start:end]
                tokens = np.zeros((1, 160), np.int32)
                tokens[0, : len(context) + len(response)] = context + response
                logits = np.asarray(forward(params, tokens) @ model.head(params), np.float64)[0]
                logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                before = range(len(context) - 1, len(context) - 1 + len(response))
                errors += (logprobs[before, response] - c.logprobs[start:end]).tolist()
        assert len(errors) > 30
        np.testing.assert_allclose(errors, 0, atol=1e-5)


def test_learnt_or_not_a_turn_is_the_same(pair: Pair, mixed: list[Conversation]) -> None:
    for given, learnt in zip(play(pair, share=0.5, learnt=False), mixed, strict=True):
        assert (given.tokens, given.turns, given.logprobs, given.spans) == (
            *(learnt.tokens, learnt.turns, learnt.logprobs),
            learnt.spans,
        )
        of_teacher = {k for k, turn in enumerate(learnt.turns) if turn.actor is T}
        assert given.turn_id == [NO_TURN if k in of_teacher else k for k in learnt.turn_id]


def test_an_episode_is_the_same_to_the_bit_whatever_other_rows_play(
    pair: Pair, mixed: list[Conversation]
) -> None:
    order = [3, 1, 4, 0, 2]
    assert play(pair, share=0.5, numbers=order) == [mixed[n] for n in order]
    assert play(pair, share=0.5, numbers=[2]) == [mixed[2]]


def test_the_time_that_environments_take_changes_nothing(pair: Pair) -> None:
    class Slow(Household):
        """Answers late, and never twice after the same time."""

        waits = True

        def step(self, response: str) -> Observation:
            time.sleep(random.random() / 50)
            return super().step(response)

    assert play(pair, share=0.5, kind=Slow, join_after=1) == play(pair, share=0.5, join_after=1)


def test_with_part_of_the_history_the_teacher_reads_what_the_student_would(pair: Pair) -> None:
    guided = play(pair, share=1.0, history_turns=1)
    assert [as_students(c) for c in guided] == play(pair, player=T, history_turns=1)
