"""The agent loop: conversations written out by hand, and what holds for any model.

One of the three tests to read first: it shows what an episode is, token by token.
"""

import dataclasses
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import chain
from small_agent import DECODING, household, household_agent, with_decoding
from words import word_tokenizer

from opd_jax import model
from opd_jax.agent import generate as gen
from opd_jax.agent.agent import Agent
from opd_jax.agent.chat import ChatFormat
from opd_jax.agent.conversation import Conversation
from opd_jax.agent.positions import Positions
from opd_jax.agent.rollout import rollout, row_keys
from opd_jax.envs.base import Observation, Task
from opd_jax.envs.household.env import Household
from opd_jax.learner.batch import pack
from opd_jax.losses import NO_TURN

# --- A forced model and a scripted environment --------------------------------------------------

WORDS = ["<unk>", "<system>", "<user>", "<end>", "act", "call", "bell", "ring", "hear", "echo"]
WORDS += ["stop", "wheel", "spin", "long", "road", "walk", "fine"]
# What the model says after each word. `spin` never ends.
NEXT = {"bell": "ring", "ring": "<end>", "echo": "stop", "stop": "<end>"}
NEXT |= {"wheel": "spin", "spin": "spin", "road": "walk", "walk": "<end>"}
SHARPNESS = 4.0  # the logit of every step of the chain
# The environment's reply to each response. "fine" ends an episode with success, "" without.
REPLIES = {"ring": "hear echo", "stop": "fine", "walk": "", "spin spin spin": "call bell"}


class Scripted:
    """An environment that answers by `REPLIES`; task n starts with the n-th opening."""

    system = "act"
    waits = False

    def __init__(self, openings: list[str], replies: Mapping[str, str]):
        self.openings, self.replies = openings, replies
        self.heard: list[str] = []

    def size(self, split: str) -> int:
        return len(self.openings)

    def reset(self, split: str, index: int) -> Observation:
        text = self.openings[index]
        self.task = Task(id=f"{split}/{index}", type="scripted", goal="none", scene=text)
        return Observation(text, text, ("ring",))

    def step(self, response: str) -> Observation:
        self.heard.append(response)
        text = self.replies[response]
        end = {"fine": "success", "": "quiet"}.get(text, "")
        return Observation(text, text, (), end, float(end == "success"), action=response)


CONTEXT, ENVS = 13, 6


def golden_agent() -> tuple[Agent, model.Params]:
    tokenizer = word_tokenizer(WORDS)
    successor = {WORDS.index(word): WORDS.index(following) for word, following in NEXT.items()}
    config, params = chain(len(WORDS), successor, logit=SHARPNESS)
    decoding = dataclasses.replace(
        DECODING,
        temperature=0.0,
        turn_tokens=3,
        context_tokens=CONTEXT,
        extend_widths=(2, 8),
        chunk=2,
    )
    agent = Agent(config, tokenizer, ChatFormat.from_tokenizer(tokenizer), decoding)
    return agent, params


def play_script(envs: list[Any], *, tasks: int) -> list[Conversation]:
    """One episode of each of the first openings."""
    agent, params = golden_agent()
    return rollout(
        params,
        row_keys(jax.random.key(0), range(tasks)),
        agent=agent,
        envs=envs,
        tasks=[("any", n) for n in range(tasks)],
        depth=0,
    )


def scripted(openings: list[str], replies: Mapping[str, str]) -> list[Scripted]:
    return [Scripted(openings, replies) for _ in range(ENVS)]


# Opening, whole conversation, turn of each token, stop of each turn, end. Written by hand from the
# template.
GOLDEN = [
    (
        "call bell",
        "<system> act <user> call bell ring <end> <user> hear echo stop <end>",
        ".....00...11",
        ["stop_token", "stop_token"],
        "success",
    ),
    (
        "long long road",
        "<system> act <user> long long road walk <end>",
        "......00",
        ["stop_token"],
        "quiet",
    ),
    (  # The budget cuts the first answer, so its <end> is given and not sampled. Then the context
        "wheel",  # is full to its last slot.
        "<system> act <user> wheel spin spin spin <end> <user> call bell ring <end>",
        "....000....11",
        ["turn_budget", "stop_token"],
        "context",
    ),
    (  # Two slots are left for three tokens.
        "long long long long long long long wheel",
        "<system> act <user> long long long long long long long wheel spin spin",
        "...........00",
        ["context"],
        "context",
    ),
    (  # The answer fits and what follows does not: the conversation ends with the answer.
        "long long long long call bell",
        "<system> act <user> long long long long call bell ring <end>",
        ".........00",
        ["stop_token"],
        "context",
    ),
]


def provenance(conversation: Conversation) -> str:
    return "".join("." if turn == NO_TURN else str(turn) for turn in conversation.turn_id)


@pytest.fixture(scope="module")
def golden() -> list[Conversation]:
    openings = [opening for opening, *_ in GOLDEN]
    envs = scripted(openings, REPLIES | {"spin spin": "call bell"})
    played = play_script(envs, tasks=len(GOLDEN))
    # The environments heard the sampled words, without the token that ended the turn.
    assert [env.heard for env in envs] == [
        ["ring", "stop"],
        ["walk"],
        ["spin spin spin", "ring"],
        ["spin spin"],
        ["ring"],
        [],
    ]
    return played


@pytest.mark.parametrize("row", range(len(GOLDEN)))
def test_golden_conversation(golden: list[Conversation], row: int) -> None:
    _, words, turns, stops, end = GOLDEN[row]
    conversation = golden[row]
    assert [WORDS[i] for i in conversation.tokens] == words.split()
    assert provenance(conversation) == turns
    assert [turn.stop for turn in conversation.turns] == stops
    assert conversation.end == end


def test_golden_scores_and_logprobs(golden: list[Conversation]) -> None:
    assert [c.success for c in golden] == [True, False, False, False, False]
    assert [c.score for c in golden] == [1, 0, 0, 0, 0]
    # Each step of the chain has logit SHARPNESS against V - 1 zeros.
    expected = -np.log1p((len(WORDS) - 1) * np.exp(-SHARPNESS))
    for conversation in golden:
        sampled = np.array(conversation.turn_id) != NO_TURN
        np.testing.assert_allclose(np.array(conversation.logprobs)[sampled], expected, atol=1e-5)
        assert not np.array(conversation.logprobs)[~sampled].any()


def test_golden_turns_hold_what_was_seen_said_and_answered(golden: list[Conversation]) -> None:
    first, second = golden[0].turns
    assert (first.observation, first.admissible) == ("call bell", ("ring",))
    assert (first.response, first.action, first.feedback) == ("ring", "ring", "hear echo")
    assert (second.observation, second.admissible) == ("hear echo", ())
    assert (second.response, second.action, second.feedback) == ("stop", "stop", "fine")


def test_an_environment_that_ends_outranks_a_full_context() -> None:
    (played,) = play_script(scripted([GOLDEN[3][0]], {"spin spin": "fine"}), tasks=1)
    assert (played.turns[0].stop, played.end, played.score) == ("context", "success", 1)


def test_a_first_prompt_must_leave_room_for_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    openings = ["long " * words + "bell" for words in (8, 9)]  # and three tokens of the system
    (played,) = play_script(scripted(openings, REPLIES), tasks=1)
    assert [WORDS[i] for i in played.tokens[12:]] == ["ring"]
    # One that leaves none ends its own episode.
    first, second = play_script(scripted(openings, REPLIES), tasks=2)
    assert first == played
    assert (second.end, second.tokens, second.turns) == ("context", [], [])
    assert second.unfit
    play_script(scripted(openings, REPLIES), tasks=2)
    said = r"any/1 has 13 tokens, expected fewer than 13; its episodes are left out"
    assert len(re.findall(said, caplog.text)) == 1


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_response_ends_where_it_begins_an_invented_turn(chunk: int) -> None:
    agent, params = golden_agent()
    agent = with_decoding(agent, turn_tokens=6, chunk=chunk)
    agent = dataclasses.replace(agent, invented=re.compile("spin spin"))
    envs = scripted(["wheel"], {"spin spin": "call bell", "ring": "fine"})
    keys = row_keys(jax.random.key(0), range(1))
    (played,) = rollout(params, keys, agent=agent, envs=envs, tasks=[("any", 0)], depth=0)
    words = "<system> act <user> wheel spin spin <end> <user> call bell ring <end>"
    assert [WORDS[i] for i in played.tokens] == words.split()
    assert provenance(played) == "....00....11"
    assert [turn.stop for turn in played.turns] == ["invented_turn", "stop_token"]
    assert played.success


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_sampled_special_token_that_ends_no_turn_ends_the_response(chunk: int) -> None:
    agent, _ = golden_agent()
    following = NEXT | {"spin": "<user>", "<user>": "call"}
    pairs = {WORDS.index(word): WORDS.index(then) for word, then in following.items()}
    config, params = chain(len(WORDS), pairs, logit=SHARPNESS)
    agent = dataclasses.replace(with_decoding(agent, turn_tokens=6, chunk=chunk), model=config)
    envs = scripted(["wheel"], {"spin": "call bell", "ring": "fine"})
    keys = row_keys(jax.random.key(0), range(1))
    (played,) = rollout(params, keys, agent=agent, envs=envs, tasks=[("any", 0)], depth=0)
    # The token stays the student's. What acts is the text before it: the scripted one is "spin".
    words = "<system> act <user> wheel spin <user> <end> <user> call bell ring <end>"
    assert [WORDS[i] for i in played.tokens] == words.split()
    assert provenance(played) == "....00....11"
    assert [turn.stop for turn in played.turns] == ["invented_turn", "stop_token"]
    assert [turn.response for turn in played.turns] == ["spin", "ring"]


def test_environments_that_wait_are_waited_for_together() -> None:
    everybody = threading.Barrier(ENVS)

    class Meeting(Scripted):
        """Answers when the others have been asked as well."""

        waits = True

        def step(self, response: str) -> Observation:
            everybody.wait(timeout=60)
            return super().step(response)

    together, alone = (
        play_script([kind([GOLDEN[0][0]] * ENVS, REPLIES) for _ in range(ENVS)], tasks=ENVS)
        for kind in (Meeting, Scripted)
    )
    assert together == alone


def test_a_task_without_a_key_is_refused() -> None:
    agent, params = golden_agent()
    keys = jax.random.split(jax.random.key(0), 3)
    with pytest.raises(ValueError, match=r"`keys`.*one for each of 2 tasks, got shape \(3,\)"):
        rollout(params, keys, agent=agent, envs=[], tasks=[("any", 0), ("any", 1)], depth=0)


# --- A random model in a household --------------------------------------------------------------

ROWS, MAX_TURNS = 4, 4
TASKS = [("train", 3), ("valid_seen", 5), ("valid_unseen", 0), ("train", 8)]


@pytest.fixture(scope="module")
def agent() -> Agent:
    made = household_agent(context_tokens=118, extend_widths=(16, 32), chunk=5)
    # A random model samples any token; here a special one is like the others.
    return dataclasses.replace(made, chat=dataclasses.replace(made.chat, turn_marks=frozenset()))


@pytest.fixture(scope="module")
def params(agent: Agent, random_params: Callable) -> model.Params:
    made = random_params(agent.model, seed=4)
    # A direction that every token has and the end of a turn likes: some turns end by themselves.
    made["embed"][:, 0] = 2
    made["final_norm"][0] = 1
    made["head"][0, agent.chat.stop_ids[0]] = 4.0
    return jax.tree.map(jnp.asarray, made)


def play(
    agent: Agent,
    params: model.Params,
    tasks: list[tuple[str, int]],
    *,
    seed: int = 0,
    rows: int = ROWS,
    keys: Sequence[int] | None = None,
    kind: type[Household] = Household,
    positions: Positions | None = None,
) -> list[Conversation]:
    """One episode of each task; `keys` are the numbers of their keys."""
    return rollout(
        params,
        row_keys(jax.random.key(seed), keys or range(len(tasks))),
        agent=agent,
        envs=[kind(size="small", max_turns=MAX_TURNS, show_admissible=2) for _ in range(rows)],
        tasks=tasks,
        depth=0,
        positions=positions,
    )


def programs() -> tuple[int, int]:
    return gen.extend._cache_size(), gen.generate._cache_size()


@pytest.fixture(scope="module")
def counted(agent: Agent, params: model.Params) -> tuple[list[Conversation], list]:
    """Two batches of episodes, and the numbers of compiled programs before, between and after.

    The first in this process to run a model of these sizes.
    """
    counts = [programs()]
    first = play(agent, params, TASKS)
    counts.append(programs())
    second = play(agent, params, TASKS, seed=1)
    return first + second, [*counts, programs()]


@pytest.fixture(scope="module")
def played(counted: tuple[list[Conversation], list]) -> list[Conversation]:
    return counted[0]


def segments(conversation: Conversation) -> list[tuple[int, list[int]]]:
    """The tokens cut where `turn_id` changes."""
    cut: list[tuple[int, list[int]]] = []
    for turn, token in zip(conversation.turn_id, conversation.tokens, strict=True):
        if not cut or cut[-1][0] != turn:
            cut.append((turn, []))
        cut[-1][1].append(token)
    return cut


def test_every_stop_and_end_of_these_episodes_is_covered(played: list[Conversation]) -> None:
    # The tests below say little about a case that does not occur.
    stops = {turn.stop for c in played for turn in c.turns}
    assert stops == {"stop_token", "turn_budget", "context"}
    assert {c.end for c in played} == {"turn_limit", "context"}


def test_sampled_logprobs_are_those_of_one_forward_over_the_final_tokens(
    agent: Agent, params: model.Params, played: list[Conversation]
) -> None:
    assert check_logprobs(agent, params, played) > 200


def test_over_a_cache_in_8_bits_logprobs_are_near_those(agent: Agent, params: model.Params) -> None:
    rounded = with_decoding(agent, int8_cache=True)
    episodes = play(rounded, params, TASKS)
    assert check_logprobs(agent, params, episodes, error=0.1) > 100
    with pytest.raises(AssertionError):
        check_logprobs(agent, params, episodes)


def check_logprobs(
    agent: Agent, params: model.Params, played: list[Conversation], *, error: float = 1e-5
) -> int:
    """Compares what was sampled with one forward; returns how many tokens were."""
    batch = pack(
        played,
        np.zeros((len(played), MAX_TURNS), np.int32),
        length_multiple=8,
        response_multiple=1,
        vocab_size=agent.model.vocab_size,
    )

    @jax.jit
    def recompute(tokens: jax.Array) -> jax.Array:
        hidden = model.forward(params, tokens, config=agent.model, query_chunk=64, remat="none")
        logprobs = jax.nn.log_softmax(hidden[:, :-1] @ model.head(params))
        return jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]

    sampled = batch.turn_id[:, 1:] != NO_TURN
    np.testing.assert_allclose(
        batch.sampled_logprobs[:, 1:][sampled],
        np.asarray(recompute(batch.tokens))[sampled],
        rtol=0,
        atol=error,
    )
    return int(sampled.sum())


def test_a_conversation_is_its_chat_format_around_the_sampled_tokens(
    agent: Agent, played: list[Conversation]
) -> None:
    """Replays the recorded responses and puts each conversation together from its parts."""
    (end,) = agent.chat.stop_ids
    for conversation, (split, index) in zip(played, TASKS * 2, strict=True):
        env = household(max_turns=MAX_TURNS)
        seen = env.reset(split, index)
        given, *rest = segments(conversation)
        assert given == (NO_TURN, agent.chat.first(env.system, seen.message))
        for number, turn in enumerate(conversation.turns):
            (turn_id, tokens), rest = rest[0], rest[1:]
            assert turn_id == number
            assert 0 < len(tokens) <= agent.decoding.turn_tokens
            stopped = tokens[-1] == end
            assert end not in tokens[:-1]
            assert (turn.stop == "stop_token") == stopped
            assert turn.response == agent.tokenizer.decode(tokens[:-1] if stopped else tokens)
            assert turn.stop != "turn_budget" or len(tokens) == agent.decoding.turn_tokens
            seen = env.step(turn.response)
            assert (turn.failure, turn.feedback) == (seen.failure, seen.text)
            if rest:
                (turn_id, tokens), rest = rest[0], rest[1:]
                assert turn_id == NO_TURN
                assert tokens == agent.chat.follow(seen.message, ended=stopped)
        assert not rest
        assert conversation.end == (seen.end or "context")
        follow = agent.chat.follow(seen.message, ended=stopped)
        full = len(conversation.tokens) + len(follow) >= agent.decoding.context_tokens
        assert seen.done or full
        assert len(conversation.tokens) <= agent.decoding.context_tokens
        if turn.stop == "context":
            assert len(conversation.tokens) == agent.decoding.context_tokens


def test_what_was_sampled_is_not_tokenized_again(agent: Agent, played: list[Conversation]) -> None:
    changed = 0
    for conversation in played:
        for turn_id, tokens in segments(conversation):
            if turn_id != NO_TURN:
                text = agent.tokenizer.decode(tokens)
                changed += agent.tokenizer.encode(text, add_special_tokens=False) != tokens
    # Text would not give back these tokens. The log-probabilities above are of these.
    assert changed > 10


# Seven tasks and their keys, for fewer rows: most begin when another episode has ended.
MANY = [*TASKS, ("train", 40), ("train", 41), ("train", 42)]
ORDER = [5, 2, 6, 0, 3, 1, 4]


@pytest.mark.parametrize("join_after", [0, 1, 2])
def test_an_episode_is_the_same_to_the_bit_whatever_other_rows_play(
    join_after: int, agent: Agent, params: model.Params, played: list[Conversation]
) -> None:
    agent = with_decoding(agent, join_after=join_after)
    many = play(agent, params, MANY)
    assert many[: len(TASKS)] == played[: len(TASKS)]
    # In another order they meet others, in other rows and at other times.
    shuffled = play(agent, params, [MANY[n] for n in ORDER], keys=ORDER)
    assert shuffled == [many[n] for n in ORDER]
    # Rows without a task change nothing.
    assert play(agent, params, MANY[:2]) == many[:2]
    assert play(agent, params, []) == []
    # The same task again and again: each episode draws with a key of its own.
    same = play(agent, params, [TASKS[0]] * ROWS)
    assert same[0] == played[0]
    assert len({tuple(c.tokens) for c in same}) == ROWS


def test_the_time_that_environments_take_changes_nothing(
    agent: Agent, params: model.Params
) -> None:
    class Slow(Household):
        """Answers late, and never twice after the same time."""

        waits = True

        def step(self, response: str) -> Observation:
            time.sleep(random.random() / 50)
            return super().step(response)

    agent = with_decoding(agent, join_after=1)
    assert play(agent, params, MANY, kind=Slow) == play(agent, params, MANY)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_with_other_numbers_of_rows_episodes_differ_by_rounding(
    rows: int, agent: Agent, params: model.Params, played: list[Conversation]
) -> None:
    for ours, theirs in zip(play(agent, params, TASKS, rows=rows), played, strict=False):
        # A token may differ only if its random number lies at the boundary of two tokens. Here none
        # does.
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_every_token_is_computed_once_and_the_rest_is_padding(
    rows: int, agent: Agent, params: model.Params
) -> None:
    positions = Positions()
    played = play(agent, params, MANY, seed=1, rows=rows, positions=positions)
    sampled = sum(turn != NO_TURN for c in played for turn in c.turn_id)
    # All that precedes a last response was read, or was sampled; the token before it is fed to it.
    before = [c.turn_id[: c.spans[-1][0]] for c in played]
    given = sum(turns.count(NO_TURN) - 1 for turns in before)
    tokens = {"padded/reading": given, "padded/sampling": sampled}
    assert positions.metrics.keys() == tokens.keys()
    for name, (padded, computed) in positions.metrics.items():
        assert computed - padded == tokens[name]
        # A row alone waits for none.
        assert (padded == 0) == (name == "padded/sampling" and rows == 1)


def test_a_few_compiled_programs_serve_any_number_of_turns(
    agent: Agent, params: model.Params, counted: tuple[list[Conversation], list]
) -> None:
    conversations, (before, once, twice) = counted
    assert before[0] < once[0] <= before[0] + len(agent.decoding.extend_widths)
    assert once[1] == before[1] + 1
    assert twice == once
    # Prompts that take several steps of the widest program, and turns in plenty.
    prompts = {c.turn_id.index(0) for c in conversations}
    assert len(prompts) > 1
    assert max(prompts) > max(agent.decoding.extend_widths)
    assert max(len(c.turns) for c in conversations) == MAX_TURNS
    # Other tasks, fewer of them, and more than rows.
    now = programs()
    play(agent, params, [("train", 50), ("train", 51)], seed=7)
    play(agent, params, MANY, seed=8)
    assert programs() == now


def test_what_is_cut_off_leaves_no_trace(agent: Agent, params: model.Params) -> None:
    # A pattern that these random responses soon hold, in the middle of a chunk too.
    agent = dataclasses.replace(agent, invented=re.compile("[vwxz].*[vwxz]", re.DOTALL))
    cut = play(agent, params, TASKS)
    assert check_logprobs(agent, params, cut) > 50
    turns = [
        (turn, end - start)
        for c in cut
        for turn, (start, end) in zip(c.turns, c.spans, strict=True)
    ]
    lengths = [length for turn, length in turns if turn.stop == "invented_turn"]
    assert len({length % agent.decoding.chunk for length in lengths}) > 2
    for turn, _ in turns:
        found = agent.invented and agent.invented.search(turn.response)
        assert bool(found) == (turn.stop == "invented_turn")
    # Nothing is ever sampled in vain where the host looks after each token.
    each = play(with_decoding(agent, chunk=1), params, TASKS)
    assert [c.tokens for c in each] == [c.tokens for c in cut]


def test_a_model_that_has_diverged_is_said_to_have(agent: Agent, params: model.Params) -> None:
    lost = params | {"final_norm": params["final_norm"] * jnp.nan}
    with pytest.raises(ValueError, match=r"not finite.*diverged; lower `optimizer.learning_rate`"):
        play(agent, lost, TASKS)
