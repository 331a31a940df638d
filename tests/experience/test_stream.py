"""Supervised batches: grouping loses nothing, and a cursor is all that resuming needs."""

import dataclasses
import random
from collections import Counter

import pytest

from opd_jax.agent.conversation import Conversation, Turn
from opd_jax.envs.base import Task
from opd_jax.experience.source import Played
from opd_jax.experience.stream import (
    DemonstrationSettings,
    Stream,
    balanced_turns,
    group_by_length,
    judge_example,
)
from opd_jax.losses import NO_TURN

TASK = Task(id="t/0", type="walk", goal="walk", scene="here")
TURN = Turn(
    observation="here",
    admissible=(),
    response="walk",
    stop="stop_token",
    action="walk",
    failure="",
    feedback="there",
    oracle="",
)


def turn(**changes: str) -> Turn:
    return dataclasses.replace(TURN, **changes)


def of_length(length: int, first: int = 0) -> Conversation:
    """A conversation of `length` tokens whose second half is its only turn."""
    made = Conversation(task=TASK, end="turn_limit", turns=[TURN])
    made.append_given([first, *range(1, length // 2)])
    made.append_response(range(100, 100 + length - len(made.tokens)), [0.0] * (length // 2), 0)
    made.logprobs = [0.0] * length
    return made


# --- Grouping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("seed", range(10))
def test_every_conversation_is_in_exactly_one_batch(seed: int, parts: int) -> None:
    rng = random.Random(seed)
    multiple = rng.choice([1, 8, 32])
    budget = parts * multiple * rng.randint(200 // multiple + 1, 1_000 // multiple + 1)
    lengths = [rng.randint(2, 200) for _ in range(rng.randint(0, 60))]
    given = [of_length(length) for length in lengths]
    batches = group_by_length(
        given, tokens_per_batch=budget, length_multiple=multiple, rows_multiple=parts
    )

    real = [[c for c in batch if c.tokens] for batch, _ in batches]
    assert Counter(id(c) for batch in real for c in batch) == Counter(map(id, given))
    rows: dict[int, set[int]] = {}
    for (batch, padded), kept in zip(batches, real, strict=True):
        assert kept
        assert max(len(c.tokens) for c in kept) <= padded
        assert padded % multiple == 0
        assert len(batch) * padded <= budget
        assert len(batch) % parts == 0
        rows.setdefault(padded, set()).add(len(batch))
    assert all(len(counts) == 1 for counts in rows.values())  # one shape for each length


def test_batches_hold_like_lengths() -> None:
    rng = random.Random(0)
    given = [of_length(rng.randint(2, 200)) for _ in range(400)]
    batches = group_by_length(given, tokens_per_batch=1_000, length_multiple=20, rows_multiple=1)
    padding = 1 - sum(len(c.tokens) for c in given) / sum(len(b) * p for b, p in batches)
    assert padding < 0.2  # half of it would be padding in batches of random lengths


@pytest.mark.parametrize(("length", "multiple", "parts"), [(101, 1, 1), (90, 64, 1), (60, 1, 2)])
def test_an_example_beyond_the_batch_is_left_out(length: int, multiple: int, parts: int) -> None:
    how = dict(tokens_per_batch=100, length_multiple=multiple, rows_multiple=parts)
    short, long = of_length(5), of_length(length)
    assert group_by_length([short, long], **how) == group_by_length([short], **how)
    with pytest.raises(ValueError, match=rf"`demonstrations.tokens_per_batch`.*{length}.*got 100"):
        group_by_length([long, of_length(length + 1)], **how)


# --- Judge examples -------------------------------------------------------------------------------


def test_labels_are_balanced_and_unlabelled_or_failed_turns_left_out() -> None:
    labels = ["SKIP"] * 50 + ["WEAK"] * 3 + ["STRONG"] + [""] * 20
    turns = [turn(oracle=label, response=str(n)) for n, label in enumerate(labels)]
    turns += [turn(oracle="STRONG", failure="rejected", response="failed")] * 30
    played = [Conversation(TASK, turns=turns[::2]), Conversation(TASK, turns=turns[1::2])]
    drawn = balanced_turns(played, 90, random.Random(0))
    assert {id(c) for c, _ in drawn} == set(map(id, played))
    chosen = [c.turns[index] for c, index in drawn]
    assert Counter(t.oracle for t in chosen) == {"SKIP": 30, "WEAK": 30, "STRONG": 30}
    assert not any(t.failure for t in chosen)
    assert len({t.response for t in chosen if t.oracle == "SKIP"}) > 10
    # Labels that no turn has are left out.
    two = [Conversation(TASK, turns=[turn(oracle="WEAK"), turn(oracle="SKIP"), turn()])]
    drawn = balanced_turns(two, 10, random.Random(0))
    assert Counter(c.turns[index].oracle for c, index in drawn) == {"SKIP": 5, "WEAK": 5}
    assert balanced_turns([Conversation(TASK, turns=[turn()])], 10, random.Random(0)) == []


# --- The stream -----------------------------------------------------------------------------------

WINDOW = 7
SHOWN = DemonstrationSettings(
    sizes=("small",),
    sizes_from=(),
    player="expert",
    distraction=0.0,
    head_start=0,
    distractors=(),
    histories="",
    habits={},
    window=WINDOW,
    judge_examples=5,
    judge_contexts=("table9",),
    proposals=0,
    proposers=(),
    tokens_per_batch=80,
)


def episode(number: int) -> Conversation:
    """Episode `number`: its first token is its number, everything else follows from it."""
    rng = random.Random(number)
    made = of_length(rng.randint(4, 40), first=number)
    made.turns = [turn(oracle=rng.choice(["SKIP", "WEAK", "STRONG"]), response=str(number))]
    return made


def example(number: int, conversation: Conversation, index: int) -> Conversation:
    judged = conversation.turns[index]
    asked = [900 + number, 900, int(judged.response)], [len(judged.oracle)]
    return judge_example([asked])


def test_each_answer_of_a_judge_example_is_a_turn_and_no_question_is_learnt() -> None:
    made = judge_example([([5, 6, 7], [1, 0]), ([8], [2, 0])])
    assert made.tokens == [5, 6, 7, 1, 0, 8, 2, 0]
    assert made.turn_id == [NO_TURN] * 3 + [0, 0] + [NO_TURN] + [1, 1]
    assert len(made.logprobs) == len(made.tokens)


@pytest.fixture
def make_stream(request: pytest.FixtureRequest):
    def make(
        cursor: tuple[int, int] = (0, 0), seed: int = 0, judge_examples: int = 5, examples=example
    ) -> Stream:
        stream = Stream(
            dataclasses.replace(SHOWN, judge_examples=judge_examples),
            make_episode=episode,
            make_example=examples,
            seed=seed,
            length_multiple=8,
            rows_multiple=1,
            cursor=cursor,
        )
        request.addfinalizer(stream.close)
        return stream

    return make


def test_episodes_that_fit_no_context_are_left_out_unless_all_are(make_stream) -> None:
    unfit = Conversation(task=TASK, end="context")
    stream = make_stream(examples=None)
    whole = {tuple(c.tokens) for played, _ in draw(stream, 9) for c in played.conversations}
    stream.make_episode = lambda n: episode(n) if n % 3 else unfit
    some = [c for batch, _ in stream._generate(0) for c in batch if c.tokens]
    assert len(some) == sum(n % 3 > 0 for n in range(WINDOW))
    assert {tuple(c.tokens) for c in some} <= whole
    stream.make_episode = lambda n: unfit
    with pytest.raises(ValueError, match=r"`rollout.context_tokens`: none of"):
        stream._generate(0)


def draw(stream: Stream, count: int) -> list[tuple[Played, list[int]]]:
    """The next batches, each with the cursor behind it."""
    return [(stream.play(None), stream.cursor) for _ in range(count)]


def test_a_stream_continued_at_any_cursor_is_the_same_stream(make_stream) -> None:
    drawn = draw(make_stream(), 12)
    assert len({window for _, (window, _) in drawn}) > 2
    for n in range(9):
        assert draw(make_stream(drawn[n][1]), 3) == drawn[n + 1 : n + 4]


def test_the_seed_decides_the_order_and_not_the_episodes(make_stream) -> None:
    def window(seed: int) -> list[list[Conversation]]:
        stream, batches = make_stream(seed=seed, examples=None), []
        while stream.cursor[0] == 0:
            batches.append(stream.play(None).rows)
        return batches[:-1]  # the last one belongs to the next window

    one, other = window(3), window(4)
    assert window(3) == one
    assert one != other
    for batch in one:
        assert batch in other
    assert len(one) == len(other)


def test_a_window_holds_its_episodes_once_and_its_examples(make_stream) -> None:
    stream = make_stream()
    rows: dict[int, list[Conversation]] = {}
    while stream.cursor[0] < 3:
        played = stream.play(None)
        assert all(len(row.tokens) <= played.length_multiple for row in played.rows)
        tokens = sum(len(row.tokens) for row in played.rows)
        longest = max(len(row.tokens) for row in played.rows)
        width = -(-longest // played.length_multiple) * played.length_multiple
        positions = len(played.rows) * width
        assert played.metrics == {
            "tokens/sequence": tokens,
            "padded/update": (positions - tokens, positions),
        }
        rows.setdefault(stream.cursor[0], []).extend(row for row in played.rows if row.tokens)
    for window in range(3):
        episodes = {n: episode(n) for n in range(window * WINDOW, (window + 1) * WINDOW)}
        own = [row for row in rows[window] if row.tokens[0] < 900]
        assert sorted(own, key=lambda row: row.tokens[0]) == list(episodes.values())
        questions = [row for row in rows[window] if row.tokens[0] >= 900]
        assert len(questions) == 5
        for row in questions:
            assert row.turn_id == [NO_TURN] * 3 + [0]
            assert row.tokens[3] == len(episodes[row.tokens[2]].turns[0].oracle)
