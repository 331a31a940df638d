"""The household's tokenizer: no text has an unknown word, and phrases are single tokens."""

import hashlib
import random
import re

import pytest
from processes import run_python
from transformers import AutoTokenizer

from opd_jax.agent.chat import ChatFormat
from opd_jax.agent.conversation import Turn
from opd_jax.envs.household import tokenizer as household_tokenizer
from opd_jax.envs.household.env import Household
from opd_jax.envs.household.expert import Expert
from opd_jax.envs.household.habits import Careless, Clumsy, Mistaken
from opd_jax.envs.household.tables import OBJECTS, RECEPTACLES, SIZES, SPLIT_SIZES, TASK_TYPES
from opd_jax.envs.react import Random
from opd_jax.judge.prompt import FIELDS, LABELS, PHRASES, ROLE, RUBRIC, judge_prompt

HABITS = {"skip_step": 0.4, "list_order": 0.4, "ignore_closed": 0.4, "idle": 0.2, "forget": 0.4}


@pytest.fixture(scope="module")
def tokenizer():
    return household_tokenizer.build(phrases=PHRASES)


def careless(task, first, *, rng):
    return Careless(task, first, rng=rng, **HABITS)


def chance(task, first, *, rng):
    return Random(rng)


PLAYERS = (Expert, careless, chance, Clumsy, Mistaken)


def turn_record(before, response, after):
    return Turn(
        observation=before.text,
        admissible=before.admissible,
        response=response,
        stop="stop_token",
        action=after.action,
        failure=after.failure,
        feedback=after.text,
        oracle=after.oracle,
    )


def texts_of(size, split, tasks, *, show_admissible):
    """Every text of each player's episodes, and the judge's prompts for them."""
    env = Household(size=size, max_turns=25, show_admissible=show_admissible)
    for index in range(tasks):
        for make in PLAYERS:
            seen = env.reset(split, index)
            player = make(env.task, seen, rng=random.Random(index))
            yield from (env.system, seen.message, env.task.goal)
            while not seen.done:
                response, before = player.respond(seen), seen
                seen = env.step(response)
                yield from (response, seen.message)
                turn = turn_record(before, response, seen)
                yield judge_prompt(env.task, turn, admissible_shown=10, context="+feedback")


@pytest.mark.parametrize("size", SIZES)
def test_knows_every_text_and_gives_it_back(tokenizer, size):
    texts = set()
    for split in SPLIT_SIZES:
        for shown in (0, 6):
            texts.update(texts_of(size, split, 6, show_admissible=shown))
    for text, ids in zip(sorted(texts), tokenizer(sorted(texts))["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == text


def cut(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text))


def test_names_and_phrases_are_single_tokens(tokenizer):
    search = "Thought: find apple. none here. shelf 2 is not there. cabinet 1 is next."
    assert cut(tokenizer, f"{search}\nAction: go to cabinet 1") == [
        "Thought:", " find", " apple", ". none here.", " shelf 2", " is not there.", " cabinet 1",
        " is next.", "\nAction:", " go to",
        " cabinet 1",
    ]  # fmt: skip
    arrival = "You arrive at countertop 2. On the countertop 2, you see a apple 1, and a knife 3."
    assert cut(tokenizer, arrival) == [
        "You arrive at", " countertop 2", ". On the", " countertop 2", ", you see a", " apple",
        " 1", ", and a", " knife", " 3", ".",
    ]  # fmt: skip
    for name in (*OBJECTS, *RECEPTACLES, *TASK_TYPES):
        assert cut(tokenizer, f": {name}") == [":", f" {name}"]
    for name in RECEPTACLES:
        assert cut(tokenizer, f" {name} 1.") == [f" {name} 1", "."]
    for word in LABELS:
        assert cut(tokenizer, word) == [word]


def test_phrases_do_not_end_inside_words_or_numbers(tokenizer):
    assert cut(tokenizer, ", apple")[0] == ","
    assert cut(tokenizer, " cabinet 12") == [" cabinet", " 1", "2"]


def test_given_phrases_are_cut_at_placeholders_and_line_ends(tokenizer):
    texts = ["One rule.\n\nScore: {score}\nSeen: %s Then stop.", "GO"]
    tokenizer = household_tokenizer.build(phrases=texts)
    assert cut(tokenizer, "One rule.\n\nScore: 12\nSeen: apple Then stop.") == [
        "One rule.", "\n\nScore:", " 1", "2", "\nSeen:", " apple", " Then stop.",
    ]  # fmt: skip
    assert cut(tokenizer, "GO") == ["GO"]


def test_fixed_lines_of_the_judge_prompt_are_single_tokens(tokenizer):
    env = Household(size="small", max_turns=5, show_admissible=0)
    first = env.reset("train", 0)
    response = "Thought: look.\nAction: look"
    turn = turn_record(first, response, env.step(response))
    text = judge_prompt(env.task, turn, admissible_shown=3, context="+feedback")
    tokens = cut(tokenizer, text)
    assert tokens[:2] == [ROLE, "\n" + RUBRIC]
    fields = re.findall("^[^{]+", FIELDS["+feedback"], re.MULTILINE)
    assert {"\n" + field.rstrip() for field in fields} < set(tokens)


def test_conversations_use_one_token_a_role(tokenizer):
    chat = ChatFormat.from_tokenizer(tokenizer)
    assert tokenizer.convert_ids_to_tokens(chat.first("", "Nothing happens.")) == [
        "<|im_start|>", "user\n", "Nothing happens.", "<|im_end|>", "\n",
        "<|im_start|>", "assistant\n",
    ]  # fmt: skip
    assert chat.stop_ids == (tokenizer.eos_token_id,)
    marks = [i for i in chat.follow("<|im_end|>", ended=True) if i in chat.special_ids]
    assert marks.count(tokenizer.eos_token_id) == 1


def test_vocabulary_is_small_and_ordered(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[:4] == ["<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"]
    assert tokens[4:] == sorted(set(tokens[4:]))
    assert len(tokens) <= 900


def test_saved_files_load_alike_and_do_not_depend_on_hash_order(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "here")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "here")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    for name in ("pad_token_id", "unk_token_id", "eos_token_id"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    for text in texts_of("medium", "valid_unseen", 1, show_admissible=4):
        assert loaded.encode(text) == tokenizer.encode(text)

    code = (
        "import sys; from opd_jax.envs.household import tokenizer as h; "
        "h.build(phrases=sys.argv[2:]).save_pretrained(sys.argv[1])"
    )
    run_python(code, tmp_path / "there", *PHRASES, PYTHONHASHSEED="7")
    here, there = (
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / d).iterdir()}
        for d in ("here", "there")
    )
    assert here == there
