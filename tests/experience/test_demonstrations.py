"""Episodes of players as conversations: their tokens, whose they are, and where they end."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from opd_jax.agent.chat import ChatFormat
from opd_jax.agent.conversation import Conversation
from opd_jax.envs.base import Observation, Task
from opd_jax.envs.household import tokenizer as household_tokenizer
from opd_jax.envs.household.env import Household
from opd_jax.envs.household.expert import Expert
from opd_jax.envs.react import Random
from opd_jax.experience.demonstrations import demonstrate, play_out
from opd_jax.losses import NO_TURN

MAX_TURNS = 12


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return household_tokenizer.build(phrases=[])


@pytest.fixture(scope="module")
def chat(tokenizer: Any) -> ChatFormat:
    return ChatFormat.from_tokenizer(tokenizer)


def expert(task: Task, first: Observation, rng: random.Random) -> Expert:
    return Expert(task, first, rng=rng)


def stray(task: Task, first: Observation, rng: random.Random) -> Random:
    return Random(rng=rng)


def household(max_turns: int = MAX_TURNS) -> Household:
    return Household(size="small", max_turns=max_turns, show_admissible=3)


def written(
    chat: ChatFormat,
    index: int,
    *,
    distraction: float = 0.0,
    context_tokens: int = 2_000,
    seed: int = 0,
) -> Conversation:
    return demonstrate(
        household(),
        "train",
        index,
        player=expert,
        distractor=stray if distraction else None,
        distraction=distraction,
        rng=random.Random(seed),
        chat=chat,
        context_tokens=context_tokens,
    )


def messages(index: int, responses: Sequence[str]) -> list[dict[str, str]]:
    """The episode as chat messages, replayed from its responses."""
    env = household()
    said = [
        {"role": "system", "content": env.system},
        {"role": "user", "content": env.reset("train", index).message},
    ]
    for n, response in enumerate(responses):
        said.append({"role": "assistant", "content": response})
        after = env.step(response)
        if n + 1 < len(responses):
            said.append({"role": "user", "content": after.message})
    return said


def spans(conversation: Conversation) -> list[tuple[int, int, int]]:
    """(turn, start, end) of each run of equal `turn_id`."""
    ids = conversation.turn_id
    starts = [n for n in range(len(ids)) if n == 0 or ids[n] != ids[n - 1]]
    ends = [*starts[1:], len(ids)]
    return [(ids[start], start, end) for start, end in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("distraction", [0.0, 0.4])
def test_tokens_are_those_of_the_rendered_chat(
    tokenizer: Any, chat: ChatFormat, index: int, distraction: float
) -> None:
    made = written(chat, index, distraction=distraction)
    said = messages(index, [turn.response for turn in made.turns])
    rendered = tokenizer.apply_chat_template(said, tokenize=False)
    # The template ends a message with a line end, which belongs to the next prompt.
    expected = tokenizer.encode(rendered.removesuffix("\n"), add_special_tokens=False)
    assert made.tokens == expected
    assert made.end == ("success" if made.turns[-1].feedback and made.score else "turn_limit")
    assert not any(made.logprobs)
    if distraction:
        return
    # Undisturbed, every turn is the expert's, who succeeds.
    sampled = [span for span in spans(made) if span[0] != NO_TURN]
    assert [turn for turn, _, _ in sampled] == list(range(len(made.turns)))
    for turn, start, end in sampled:
        assert made.tokens[end - 1] == chat.stop_ids[0]
        assert tokenizer.decode(made.tokens[start : end - 1]) == made.turns[turn].response
    assert (made.success, made.score) == (True, 1)


# --- Straying -------------------------------------------------------------------------------------


class Corridor:
    """An environment of `length` turns that counts its steps."""

    system = ""
    waits = False

    def __init__(self, length: int):
        self.length = length

    def reset(self, split: str, index: int) -> Observation:
        self.steps = 0
        self.task = Task(id="corridor/0", type="walk", goal="walk", scene="0")
        return Observation("0", "0", ())

    def step(self, response: str) -> Observation:
        self.steps += 1
        text = str(self.steps)
        end = "turn_limit" if self.steps == self.length else ""
        return Observation(text, text, (), end=end, action=response)


class Sayer:
    """Says one word, and remembers what it saw."""

    def __init__(self, word: str):
        self.word, self.seen = word, []

    def respond(self, observation: Observation) -> str:
        self.seen.append(observation.text)
        return self.word


def corridor(
    chat: ChatFormat, length: int, distraction: float
) -> tuple[Conversation, list[str], list[str]]:
    player, other = Sayer("look"), Sayer("open")
    made = demonstrate(
        Corridor(length),
        "any",
        0,
        player=lambda task, first, rng: player,
        distractor=lambda task, first, rng: other,
        distraction=distraction,
        rng=random.Random(0),
        chat=chat,
        context_tokens=100_000,
    )
    return made, player.seen, other.seen


def test_strayed_turns_are_history_and_nobodys_turn(tokenizer: Any, chat: ChatFormat) -> None:
    length = 400
    made, player_saw, other_saw = corridor(chat, length, 0.3)
    responses = [turn.response for turn in made.turns]
    assert len(responses) == length
    # Both see everything, so both can go on from wherever they are.
    assert player_saw == other_saw == [str(n) for n in range(length)]
    # Six standard deviations of a binomial, fixed before the first run.
    strayed = responses.count("open")
    assert abs(strayed - 0.3 * length) < 6 * (length * 0.3 * 0.7) ** 0.5
    own = {turn for turn in made.turn_id if turn != NO_TURN}
    assert own == {n for n, response in enumerate(responses) if response == "look"}
    for turn, start, end in spans(made):
        if turn != NO_TURN:
            assert tokenizer.decode(made.tokens[start : end - 1]) == "look"
    assert tokenizer.decode(made.tokens).count("open") == strayed
    for distraction, own in ((0.0, 20), (1.0, 0)):
        made, _, _ = corridor(chat, 20, distraction)
        assert len({turn for turn in made.turn_id if turn != NO_TURN}) == own
        assert len(made.turns) == 20


def test_a_demonstration_is_a_function_of_its_task_and_seed(chat: ChatFormat) -> None:
    runs = [written(chat, 2, distraction=0.5, seed=seed) for seed in (5, 5, 6)]
    assert runs[0] == runs[1]
    assert runs[0].tokens != runs[2].tokens


# --- The end of the context -----------------------------------------------------------------------


@pytest.mark.parametrize("distraction", [0.0, 0.5])
def test_a_demonstration_is_cut_before_the_turn_that_would_not_fit(
    chat: ChatFormat, distraction: float
) -> None:
    whole = written(chat, 1, distraction=distraction)
    end = chat.stop_ids[0]
    prompt = chat.first(household().system, household().reset("train", 1).message)
    # A turn ends behind its end-of-turn token; user messages hold one too, the prompt two.
    ends = [n + 1 for n, token in enumerate(whole.tokens) if token == end][2::2]
    assert len(ends) == len(whole.turns) > 2
    none = written(chat, 1, distraction=distraction, context_tokens=len(prompt))
    assert (none.unfit, none.tokens, none.turns) == (True, [], [])
    # Every seventh length, and those around the end of each turn.
    around = {end + near for end in ends for near in (-1, 0, 1)}
    for context in sorted({*range(len(prompt) + 1, len(whole.tokens) + 1, 7), *around}):
        cut = written(chat, 1, distraction=distraction, context_tokens=context)
        kept = len(cut.turns)
        assert kept == sum(stop <= context for stop in ends)
        assert cut.turns == whole.turns[:kept]
        size = len(cut.tokens)
        assert size <= context
        assert cut.tokens == whole.tokens[:size]
        assert cut.turn_id == whole.turn_id[:size]
        # Behind the last turn there is nothing, or the whole message that would have followed.
        after = cut.tokens[ends[kept - 1] :] if kept else cut.tokens[len(prompt) :]
        assert after.count(end) == (1 if after else 0)
        assert cut.end == (whole.end if kept == len(ends) else "context")
        assert cut.broken == cut.unfit == (kept == 0)


# --- Playing without tokens -----------------------------------------------------------------------


@pytest.mark.parametrize("index", range(3))
def test_play_out_is_the_same_episode_without_tokens(chat: ChatFormat, index: int) -> None:
    made = written(chat, index)
    plain = play_out(household(), "train", index, player=expert, rng=random.Random(0))
    assert plain.turns == made.turns
    assert (plain.end, plain.score, plain.task) == (made.end, made.score, made.task)
    assert plain.tokens == []
