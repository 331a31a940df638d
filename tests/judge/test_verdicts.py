"""The judge: what it is asked, whom it is asked about, and its two decodings."""

import copy
import itertools
import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import chain, one_layer
from scipy.special import log_softmax

from opd_jax import model
from opd_jax.agent.chat import ChatFormat
from opd_jax.agent.contexts import ContextCache
from opd_jax.agent.conversation import Conversation, Turn
from opd_jax.agent.positions import Positions
from opd_jax.envs.base import BROKEN, Task
from opd_jax.judge import answer
from opd_jax.judge.answer import DECODINGS, UNPARSABLE, Judge, JudgeSettings, parse_label
from opd_jax.judge.labels import Judgement, env_labels
from opd_jax.judge.prompt import FIELDS, LABELS, ROLE, RUBRIC, Prompt, judge_prompt
from opd_jax.judge.verdicts import judge_turns, no_judge, teacher_judge
from opd_jax.losses import Verdict
from opd_jax.runtime.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("compile_quickly")

END = "<|im_end|>"
# Labels of one, two and three tokens; everything else of the prompt's values is characters.
PIECES = {"SKIP": ["SKIP"], "WEAK": ["WE", "AK"], "STRONG": ["ST", "RO", "NG"]}
TASK = Task(id="t/0", type="heat", goal="a hot egg", scene="You see a fridge.")
TURN = Turn(
    observation="The fridge is closed.",
    admissible=("open fridge", "look", "inventory"),
    response="Thought: no egg.\nAction: look",
    stop="stop_token",
    action="look",
    failure="",
    feedback="You see nothing new.",
    oracle="",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    whole = [
        ROLE,
        RUBRIC,
        *re.findall("^[^{]+", FIELDS["+feedback"], re.MULTILINE),
        *(piece for label in LABELS for piece in PIECES[label]),
    ]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocab = ["<|unk|>", "<|im_start|>", END, *whole, *characters]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocab)}, unk_token="<|unk|>"))
    pattern = "|".join([*map(re.escape, whole), r"[\s\S]"])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<|unk|>",
        eos_token=END,
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert [made.tokenize(label) for label in LABELS] == [PIECES[label] for label in LABELS]
    return made


SETTINGS = JudgeSettings(
    by="teacher",
    decode="constrained",
    model="",
    prompt="",
    context="table9",
    admissible_shown=30,
    batch=4,
    extend_widths=(8, 32),
    prefill_rows=3,
    max_new_tokens=5,
    agreement_every=0,
    agreement_turns=100,
)


@pytest.fixture(scope="module")
def random_judge(tokenizer: Any) -> Judge:
    chat = ChatFormat.from_tokenizer(tokenizer)
    return Judge(one_layer(len(tokenizer)), tokenizer, chat, SETTINGS)


def test_a_judge_goes_back_in_its_cache_so_it_is_ours(random_judge: Judge) -> None:
    with pytest.raises(ValueError, match="so it is a `ModelConfig`, got a `Model`"):
        replace(random_judge, model=model.Model(hidden=print, head=model.head))


def with_settings(judge: Judge, **changes: Any) -> Judge:
    return replace(judge, settings=replace(judge.settings, **changes))


def judged(
    params: model.Params, played: list[Conversation], *, by: Judge, max_turns: int
) -> Judgement:
    return judge_turns(params, played, env_labels(played, max_turns=max_turns), by=by)


@pytest.fixture(scope="module")
def params(random_judge: Judge, random_params: Callable) -> model.Params:
    """Random, except that it likes to start a label and to finish one that it has started.

    The seed and the scales are chosen for answers that differ from prompt to prompt.
    """
    made = random_params(random_judge.model, seed=2, scale=0.5)
    ids = random_judge.tokenizer.convert_tokens_to_ids
    starts = ids(["SKIP", "WE", "ST"])
    others = [n for n in range(random_judge.model.vocab_size) if n not in starts]
    embed, head = made["embed"], made["head"]
    made["layers"]["o"] *= 0.3
    made["layers"]["down"] *= 0.3
    embed[:, 0], made["final_norm"][:] = 2, 1  # a direction that every token has
    head[0, starts] = 4
    head[:, others] *= 0.3
    for start, following in (("WE", "AK"), ("ST", "RO"), ("RO", "NG")):
        head[1:, ids(following)] = 5 * embed[ids(start), 1:]
    head[1:, ids(END)] = 3 * embed[ids(["SKIP", "AK", "NG"]), 1:].sum(axis=0)
    return jax.tree.map(jnp.asarray, made)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, len(tokenizer), n).tolist() for n in rng.integers(1, 24, 30)]


@partial(jax.jit, static_argnames="config")
def _logits(params: model.Params, tokens: jax.Array, *, config: model.ModelConfig) -> jax.Array:
    hidden = model.forward(params, tokens, config=config, query_chunk=32, remat="none")
    return hidden @ model.head(params)


def full_logprobs(params: model.Params, judge: Judge, rows: list[list[int]]) -> np.ndarray:
    """Log-probabilities [rows, 32, V] of whole forwards, float64 from float32 logits."""
    tokens = np.array([row + [0] * (32 - len(row)) for row in rows], np.int32)
    return log_softmax(np.asarray(_logits(params, tokens, config=judge.model), np.float64), axis=-1)


@pytest.fixture(scope="module")
def likelihoods(params: model.Params, random_judge: Judge, prompts: list[list[int]]) -> np.ndarray:
    """log p(label | prompt) [prompts, labels]."""
    scores = np.zeros((len(prompts), len(LABELS)))
    for column, label in enumerate(LABELS):
        word = random_judge.tokenizer.convert_tokens_to_ids(PIECES[label])
        logprobs = full_logprobs(params, random_judge, [prompt + word for prompt in prompts])
        for row, prompt in enumerate(prompts):
            steps = [logprobs[row, len(prompt) - 1 + n, token] for n, token in enumerate(word)]
            scores[row, column] = sum(steps)
    return scores


# --- The prompt ---------------------------------------------------------------------------------


def test_the_prompt_of_each_context() -> None:
    table9, feedback, history, _ = (
        judge_prompt(TASK, TURN, admissible_shown=30, context=context) for context in FIELDS
    )
    assert table9 == (
        f"{ROLE}\n{RUBRIC}\n"
        "Task type: heat\n"
        "Goal: a hot egg\n"
        "Scene: You see a fridge.\n"
        "Observation: The fridge is closed.\n"
        "Admissible actions: open fridge, look, inventory\n"
        "Agent's response: Thought: no egg.\nAction: look"
    )
    assert feedback == f"{table9}\nFeedback: You see nothing new."
    # After a conversation, only what it does not hold is shown.
    assert history == f"{ROLE}\n{RUBRIC}\nAdmissible actions: open fridge, look, inventory"


RECORD = {
    "seen": ("fridge 1, closed", "desk 1: egg 1, cup 1"),
    "held": ("egg 1",),
    "tried": ("go to fridge 1: done", "take egg 1: Nothing happens."),
    "changed": (),
}


def test_the_prompt_with_a_record() -> None:
    turn = replace(TURN, record=RECORD)
    expected = (
        f"{ROLE}\n{RUBRIC}\n"
        "Goal: a hot egg\n"
        "Tried: go to fridge 1: done; take egg 1: Nothing happens.\n"
        "Seen: fridge 1, closed; desk 1: egg 1, cup 1\n"
        "Changed: nothing\n"
        "Held: egg 1\n"
        "Agent's response: Thought: no egg.\nAction: look"
    )
    shown: dict[str, Any] = dict(admissible_shown=30)
    assert judge_prompt(TASK, turn, context="record", **shown) == expected
    # The record is in no other question.
    for context in FIELDS.keys() - {"record"}:
        without = judge_prompt(TASK, TURN, context=context, **shown)
        assert judge_prompt(TASK, turn, context=context, **shown) == without


def test_a_long_record_is_shown_from_its_end() -> None:
    tried = tuple(f"{n:03}" for n in range(1000))
    turn = replace(TURN, record=RECORD | {"tried": tried, "seen": ("x" * 5000,)})
    lines = judge_prompt(TASK, turn, admissible_shown=30, context="record").splitlines()
    shown = dict(line.split(": ", 1) for line in lines[3:])
    assert shown["Tried"] == "(+970 before) " + "; ".join(tried[-30:])
    assert shown["Seen"] == "x" * 240 + "..."


@pytest.mark.parametrize(
    ("shown", "line"), [(1, "open fridge (+2 more)"), (2, "open fridge, look (+1 more)")]
)
def test_admissible_actions_beyond_the_first_are_counted(shown: int, line: str) -> None:
    prompt = judge_prompt(TASK, TURN, admissible_shown=shown, context="history")
    assert prompt.endswith(f"\nAdmissible actions: {line}")


def test_the_question_is_the_chat_templates_only_message(random_judge: Judge) -> None:
    text = judge_prompt(TASK, TURN, admissible_shown=30, context="table9")
    rendered = random_judge.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    tokens = random_judge.question(conversation(""), 0)
    assert random_judge.prefix(conversation(""), 0) == []
    assert tokens == random_judge.tokenizer.encode(rendered, add_special_tokens=False)
    assert random_judge.tokenizer.unk_token_id not in tokens


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decode", "sampled"),
        ("context", "table10"),
        ("admissible_shown", -1),
        ("batch", 0),
        ("prefill_rows", 0),
        ("max_new_tokens", 0),
        ("agreement_every", -1),
        ("agreement_turns", 0),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: int | str) -> None:
    with pytest.raises(ValueError, match=f"^`{name}`: expected .* got .*{value}"):
        replace(SETTINGS, **{name: value})


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("SKIP", Verdict.SKIP),
        ("weak.", Verdict.WEAK),
        ("My verdict: **Strong**", Verdict.STRONG),
        ("skip. Skip", Verdict.SKIP),
        ("STRONG, not SKIP", UNPARSABLE),
        ("I would not SKIP this: STRONG", UNPARSABLE),
        ("skipping", UNPARSABLE),
        ("WEAKSTRONG", UNPARSABLE),
        ("DET_FAIL", UNPARSABLE),
        ("", UNPARSABLE),
    ],
)
def test_the_one_whole_word_is_the_label(text: str, label: int) -> None:
    assert parse_label(text) == label


# --- The two decodings --------------------------------------------------------------------------


def answers(params: model.Params, judge: Judge, prompts: list[list[int]], decode: str) -> list[int]:
    """Labels of prompts as they are, all in one batch."""
    cache, last = read(params, judge, prompts)
    asked = np.ones(len(prompts), np.int32)
    return [given.label for given in DECODINGS[decode](cache, last, asked, by=judge)]


def read(
    params: model.Params, judge: Judge, prompts: list[list[int]]
) -> tuple[ContextCache, np.ndarray]:
    """The prompts in a cache, and their last tokens."""
    width, rows = max(map(len, prompts)), len(prompts)
    cache = ContextCache(
        params,
        sizes=judge.model,
        rows=rows,
        slots=width + 8,
        widths=[width],
        rows_read=rows,
        positions=Positions(),
        purpose="judging",
    )
    for row, prompt in enumerate(prompts):
        cache.put(row, prompt)
    cache.read(range(rows))
    return cache, np.array([prompt[-1] for prompt in prompts], np.int32)


def test_constrained_picks_the_label_of_the_largest_likelihood(
    params: model.Params, random_judge: Judge, prompts: list[list[int]], likelihoods: np.ndarray
) -> None:
    read_before, last = read(params, random_judge, prompts)
    scores, cache = answer.label_scores(
        read_before.params,
        read_before.take(),
        last,
        np.ones(len(prompts), np.int32),
        *answer.label_tokens(random_judge.chat),
        config=random_judge.model,
        sharded=False,
    )
    np.testing.assert_allclose(scores, likelihoods, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(
        cache.lengths, [*map(len, prompts)]
    )  # the labels themselves are dropped
    best_two = np.sort(likelihoods, axis=1)[:, -2:]
    assert (np.diff(best_two) > 1e-3).all()  # no tie that rounding could turn
    got = answers(params, random_judge, prompts, "constrained")
    assert got == likelihoods.argmax(axis=1).tolist()
    assert set(got) == {Verdict.SKIP, Verdict.WEAK, Verdict.STRONG}


def test_words_of_a_prompt_stand_for_its_verdicts(
    params: model.Params, random_judge: Judge, prompts: list[list[int]]
) -> None:
    ours = answers(params, random_judge, prompts, "constrained")
    turned = Prompt(("STRONG", "SKIP", "WEAK"), (Verdict.SKIP, Verdict.WEAK, Verdict.STRONG), "?")
    meaning = {
        Verdict.STRONG: Verdict.SKIP,
        Verdict.SKIP: Verdict.WEAK,
        Verdict.WEAK: Verdict.STRONG,
    }
    judge = replace(random_judge, prompt=turned)
    assert answers(params, judge, prompts, "constrained") == [meaning[Verdict(v)] for v in ours]


def test_generate_reads_the_greedy_answer(
    params: model.Params, random_judge: Judge, prompts: list[list[int]]
) -> None:
    (end,) = random_judge.chat.stop_ids
    greedy: list[list[int]] = [[] for _ in prompts]
    for _ in range(SETTINGS.max_new_tokens):
        rows = [prompt + said for prompt, said in zip(prompts, greedy, strict=True)]
        logprobs = full_logprobs(params, random_judge, rows)
        for row, said in enumerate(greedy):
            if said[-1:] != [end]:
                said.append(int(logprobs[row, len(rows[row]) - 1].argmax()))
    want = [parse_label(random_judge.tokenizer.decode(said)) for said in greedy]
    assert answers(params, random_judge, prompts, "generate") == want
    assert len(set(want)) > 1


def forced(judge: Judge, *sequences: list[str]) -> tuple[Judge, model.Params]:
    """A judge whose next token depends on the last one only, as in `sequences`."""
    ids = [judge.tokenizer.convert_tokens_to_ids(words) for words in sequences]
    successor = {a: b for words in ids for a, b in itertools.pairwise(words)}
    config, params = chain(judge.model.vocab_size, successor, logit=20)
    return with_settings(replace(judge, model=config), extend_widths=(128,)), params


def always(judge: Judge, *words: str) -> tuple[Judge, model.Params]:
    """A judge that answers every question with `words`; a question ends with a line end."""
    return forced(judge, ["\n", *words])


def conversation(*failures: str) -> Conversation:
    """One turn for each of `failures`; "" for a turn that did not fail."""
    turns = [replace(TURN, failure=failure) for failure in failures]
    return Conversation(task=TASK, turns=turns, end="turn_limit")


@pytest.mark.parametrize("words", [["x", END], ["x", "x"], ["x", "SKIP", END]])
def test_an_unparsable_answer_is_strong_and_counted(random_judge: Judge, words: list[str]) -> None:
    judge, params = always(random_judge, *words)
    judge = with_settings(judge, decode="generate")
    got = judged(params, [conversation("", "rejected")], by=judge, max_turns=3)
    assert got.verdict.tolist() == [[Verdict.STRONG, Verdict.DET_FAIL, Verdict.SKIP]]
    assert got.unparsable.tolist() == [[True, False, False]]


@pytest.mark.parametrize(("decode", "answered"), [("constrained", 1 + 3), ("generate", 2)])
def test_what_a_question_computes_is_counted(
    decode: str, answered: int, random_judge: Judge
) -> None:
    # It reads the last token and of the words WEAK and STRONG all but the last tokens; or it says
    # STRONG in the two steps that remain.
    judge, params = always(random_judge, "ST", END)
    judge = with_settings(judge, decode=decode, extend_widths=(8, 32))
    played = [conversation("")]
    positions = Positions()
    labels = env_labels(played, max_turns=1)
    judge_turns(params, played, labels, by=judge, positions=positions)
    unread = len(judge.question(played[0], 0)) - 1
    read = sum(8 if rest <= 8 else 32 for rest in range(unread, 0, -32))
    computed = read + {"constrained": 1 + 3 * 2, "generate": 2}[decode]
    assert positions.metrics == {"padded/judging": (computed - unread - answered, computed)}


def test_a_labeller_asks_the_other_decoding_now_and_then(random_judge: Judge) -> None:
    # Constrained decoding finds WEAK likelier. The free answer begins with it and goes on.
    judge, params = always(random_judge, *PIECES["WEAK"], "x", "x")
    played = [conversation("", "rejected")]
    want = [[Verdict.WEAK, Verdict.DET_FAIL, Verdict.SKIP]]
    positions = Positions()
    judge_turns(params, played, env_labels(played, max_turns=3), by=judge, positions=positions)
    asked_alone = positions.tokens("judging")  # the check is not counted
    assert asked_alone > len(judge.question(played[0], 0)) - 1
    for every, asked in ((2, [0, 2]), (0, [])):
        by = with_settings(judge, agreement_every=every)
        label = teacher_judge(params, by=by, max_turns=3, seed=0)
        for update in range(3):
            verdict, metrics, *_ = label(played, update)
            assert verdict.tolist() == want  # whatever the other decoding says
            assert metrics["verdict/weak"] == (1, 2)
            assert metrics["tokens/judge"] == asked_alone
            assert "judge/precision" not in metrics  # the environment has no labels
            assert ("judge/decodings_agree" in metrics) == (update in asked)
            if update in asked:
                assert metrics["judge/decodings_agree"] == (0, 0)
                assert metrics["judge/unparsable_generate"] == (1, 1)
    verdict, metrics, *_ = no_judge(max_turns=3)(played, 0)
    assert (verdict.tolist(), metrics) == ([[Verdict.STRONG] * 3], {})


@pytest.mark.parametrize("context", ["table9", "history"])
def test_judging_may_be_left_between_batches_of_questions(
    context: str, random_judge: Judge
) -> None:
    class Left(Exception):
        pass

    def between() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise Left

    asked: list[int] = []
    judge, params = always(with_settings(random_judge, batch=2), *PIECES["WEAK"], END)
    played = [conversation("") for _ in range(5)]
    label = teacher_judge(params, by=judge, max_turns=3, seed=0, between=between)
    with pytest.raises(Left):
        label(played, 1)
    label(played, 1)
    assert len(asked) == 2 + 3  # five questions, two at a time


# --- Which turns are asked about ----------------------------------------------------------------


@pytest.mark.parametrize("decode", ["constrained", "generate"])
def test_turns_that_failed_and_broken_episodes_never_reach_the_judge(
    random_judge: Judge, decode: str
) -> None:
    judge, params = always(with_settings(random_judge, decode=decode), *PIECES["WEAK"], END)
    # A question about one of these turns would not fit into the teacher and raise.
    long = replace(TURN, response="x" * 300, failure="no_action")
    played = [conversation("", "empty", ""), conversation("rejected"), conversation("")]
    played.append(replace(conversation("", "rejected"), end=BROKEN))
    for c in played:
        c.turns = [long if turn.failure else turn for turn in c.turns]
    got = judged(params, played, by=judge, max_turns=4)
    assert got.asked.tolist() == [
        [True, False, True, False],
        [False] * 4,
        [True, False, False, False],
        [False] * 4,
    ]
    weak, failed, skip = Verdict.WEAK, Verdict.DET_FAIL, Verdict.SKIP
    assert got.verdict.tolist() == [
        [weak, failed, weak, skip],
        [failed, skip, skip, skip],
        [weak, skip, skip, skip],
        [skip] * 4,
    ]
    assert not got.unparsable.any()
    # A batch in which every turn failed asks nothing.
    nobody = judged(params, played[1:2], by=judge, max_turns=1)
    assert (nobody.verdict.tolist(), nobody.asked.any()) == ([[failed]], False)


@pytest.mark.parametrize("decode", ["constrained", "generate"])
def test_a_question_may_fill_the_teachers_positions_and_no_more(
    random_judge: Judge, decode: str
) -> None:
    judge, params = always(with_settings(random_judge, decode=decode), "SKIP", END)
    room = {"constrained": 3, "generate": SETTINGS.max_new_tokens}[decode]  # the longest answer
    empty = Conversation(task=TASK, turns=[replace(TURN, response="")])
    used = len(judge.question(empty, 0))
    fits = judge.model.max_positions - room - used

    def play(*sizes: int) -> list[Conversation]:
        return [
            Conversation(task=TASK, turns=[replace(TURN, response="x" * size)]) for size in sizes
        ]

    got = judged(params, play(fits, fits + 1, 0), by=judge, max_turns=1)
    assert got.verdict[:, 0].tolist() == [Verdict.SKIP, Verdict.STRONG, Verdict.SKIP]
    assert got.too_long[:, 0].tolist() == [False, True, False]
    assert got.asked[:, 0].tolist() == got.answered[:, 0].tolist() == [True, False, True]
    assert not got.unparsable.any()


def test_decodings_are_compared_where_both_were_asked(random_judge: Judge) -> None:
    judge, params = always(with_settings(random_judge, agreement_every=1), *PIECES["SKIP"], END)
    empty = Conversation(task=TASK, turns=[replace(TURN, response="")])
    # Words take more room than a score, so only the score of the longer question fits.
    room = judge.model.max_positions - judge.answer_tokens - len(judge.question(empty, 0))
    long = Conversation(task=TASK, turns=[replace(TURN, response="x" * room)])
    metrics = teacher_judge(params, by=judge, max_turns=1, seed=0)([long, empty], 0).metrics
    assert metrics["judge/asked"] == (2, 2)
    assert metrics["judge/decodings_agree"] == (1, 1)
    assert metrics["judge/unparsable_generate"] == (0, 1)


def test_the_other_decoding_is_asked_a_sample(random_judge: Judge) -> None:
    how = dict(agreement_every=1, agreement_turns=3)
    # Constrained decoding calls each turn SKIP; the free answer agrees.
    judge, params = always(with_settings(random_judge, **how), "SKIP", END)
    played = [conversation("", "rejected", ""), conversation("rejected"), conversation("", "")]
    verdict, metrics, *_ = teacher_judge(params, by=judge, max_turns=3, seed=0)(played, 0)
    failed = Verdict.DET_FAIL
    assert verdict.tolist() == [[0, failed, 0], [failed, 0, 0], [0, 0, 0]]
    assert metrics["judge/asked"] == (4, 6)
    assert metrics["judge/decodings_agree"] == (3, 3)
    assert metrics["judge/unparsable_generate"] == (0, 3)


def test_only_a_judge_that_no_question_fits_is_a_mistake(
    random_judge: Judge, caplog: pytest.LogCaptureFixture
) -> None:
    judge, params = always(with_settings(random_judge, decode="constrained"), "SKIP", END)
    task = replace(TASK, id="t/wordy")
    wordy = Conversation(task=task, turns=[replace(TURN, response="x" * 300)])
    short = Conversation(task=TASK, turns=[TURN])
    label = teacher_judge(params, by=judge, max_turns=1, seed=0)
    with pytest.raises(ValueError, match=r"`judge`: none of 2 questions.*admissible_shown"):
        label([wordy, wordy], 0)
    metrics = label([wordy, short], 0)[1]
    assert metrics["judge/asked"] == metrics["judge/too_long"] == (1, 2)
    assert metrics["judge/unparsable"] == (0, 1)
    assert [count.tolist() for count in metrics["by_turn/strong"]] == [[1], [2]]
    # Later a batch may have nothing but long questions, also just after a resume.
    verdict, metrics, *_ = teacher_judge(params, by=judge, max_turns=1, seed=0)([wordy], 2)
    assert (verdict.tolist(), metrics["judge/too_long"]) == ([[Verdict.STRONG]], (1, 1))
    assert caplog.text.count("t/wordy") == 1


@pytest.mark.parametrize("decode", ["constrained", "generate"])
def test_verdicts_stay_with_their_turns(random_judge: Judge, decode: str) -> None:
    # Rows take conversations in order of their turns. Each answer has to find its way back.
    tokenizer = copy.copy(random_judge.tokenizer)
    # Nothing follows a question, so that its last letter can decide the answer.
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>"
        "{% else %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}"
    )
    follows = dict(zip("abc", LABELS, strict=True))
    judge, params = forced(random_judge, *([a, *PIECES[follows[a]], END] for a in follows))
    judge = replace(judge, chat=ChatFormat.from_tokenizer(tokenizer))
    rng = random.Random(0)
    played = [conversation(*[""] * turns) for turns in (3, 1, 4, 2)]
    expected = np.full((4, 4), Verdict.SKIP)
    for row, c in enumerate(played):
        for index in range(len(c.turns)):
            letter = rng.choice("abc")
            response = "z" * rng.randint(0, 40) + letter
            c.turns[index] = replace(TURN, response=response)
            expected[row, index] = Verdict[follows[letter]]
    played[2].turns[1] = replace(TURN, failure="rejected")
    expected[2, 1] = Verdict.DET_FAIL
    assert len(set(expected.flatten())) == 4
    for batch, widths in ((4, (128,)), (3, (8, 32))):
        by = with_settings(judge, batch=batch, extend_widths=widths, decode=decode)
        got = judged(params, played, by=by, max_turns=4)
        assert got.verdict.tolist() == expected.tolist()
        assert (got.given == [[k < len(c.turns) for k in range(4)] for c in played]).all()
        # The scores are those of the turn, and there are none where no words were compared.
        compared = got.asked & (decode == "constrained")
        assert (got.scores[compared].argmax(axis=-1) == expected[compared]).all()
        assert np.isnan(got.scores[~compared]).all()
        assert (got.scores[compared] <= 0).all()


# --- Behind the conversation --------------------------------------------------------------------


def talk(judge: Judge, seed: int, stops: str) -> Conversation:
    """Random words; a turn for each of `stops`: ended by itself (.), cut (!), or failed (x)."""
    rng = np.random.default_rng(seed)

    def words() -> str:
        return "".join(rng.choice(list("abcdefgh "), rng.integers(3, 9)))

    made = Conversation(task=TASK, end="turn_limit")
    made.append_given(judge.chat.first("", words()))
    for index, stop in enumerate(stops):
        response = words()
        tokens = judge.tokenizer.encode(response, add_special_tokens=False)
        ended = stop != "!"
        made.append_response(
            [*tokens, *judge.chat.stop_ids[:ended]], [-1.0] * (len(tokens) + ended), index
        )
        made.turns.append(
            replace(
                TURN,
                response=response,
                stop="stop_token" if ended else "turn_budget",
                failure="rejected" if stop == "x" else "",
            )
        )
        made.append_given(judge.chat.follow(words(), ended=ended))
    return made


@pytest.fixture(scope="module")
def behind(random_judge: Judge) -> Judge:
    return with_settings(random_judge, context="history", admissible_shown=0)


def test_the_question_goes_on_from_the_conversation(behind: Judge) -> None:
    played = talk(behind, 0, ".!.")
    question = behind.chat.follow(
        judge_prompt(TASK, TURN, admissible_shown=0, context="history"), ended=True
    )
    for index, (start, end) in enumerate(played.spans):
        prefix = behind.prefix(played, index)
        assert prefix == played.tokens[:end]
        asked = behind.question(played, index)
        if index == 1:  # the end of a turn that was cut has to be given
            assert prefix[-1] != behind.chat.stop_ids[0]
            assert asked == [behind.chat.stop_ids[0], *question]
        else:
            assert prefix[-1] == behind.chat.stop_ids[0]
            assert asked == question
        assert end > start


CONVERSATIONS = ["..!.", ".", "x", "!x..", "x!"]


def test_verdicts_behind_conversations_are_those_of_whole_prompts(
    params: model.Params, behind: Judge
) -> None:
    # What was read before decides, and not the words at the end, which are always the same.
    sharper = {name: factor * params["layers"][name] for name, factor in (("o", 12), ("q_norm", 6))}
    params = params | {"layers": params["layers"] | sharper}
    played = [talk(behind, n, stops) for n, stops in enumerate(CONVERSATIONS)]
    played.insert(2, Conversation(task=None))
    by = with_settings(behind, batch=2, extend_widths=(16,))
    got = judged(params, played, by=by, max_turns=5)
    places = np.argwhere(got.asked)
    whole = [[*by.prefix(played[r], n), *by.question(played[r], n)] for r, n in places]
    expected = answers(params, by, whole, "constrained")
    assert len(set(expected)) > 1
    assert got.verdict[got.asked].tolist() == expected
    for row, c in enumerate(played):
        for index, turn in enumerate(c.turns):
            assert got.asked[row, index] == (not turn.failure)
            assert (got.verdict[row, index] == Verdict.DET_FAIL) == bool(turn.failure)


@pytest.mark.parametrize("decode", ["constrained", "generate"])
def test_both_decodings_answer_behind_conversations(behind: Judge, decode: str) -> None:
    judge, params = always(with_settings(behind, decode=decode), *PIECES["WEAK"], END)
    played = [talk(judge, n, stops) for n, stops in enumerate(CONVERSATIONS)]
    got = judged(params, played, by=judge, max_turns=4)
    assert got.asked.sum() == 9
    assert (got.verdict[got.asked] == Verdict.WEAK).all()
    assert not got.unparsable.any()


def test_fewer_conversations_than_devices_are_judged_on_a_mesh(
    params: model.Params, behind: Judge
) -> None:
    played = [talk(behind, n, stops) for n, stops in enumerate(CONVERSATIONS[:3])]
    expected = judged(params, played, by=behind, max_turns=5)
    by = with_settings(behind, batch=8)
    with jax.set_mesh(make_mesh(data=4, fsdp=2, tensor=1)):
        got = judged(params, played, by=by, max_turns=5)
    np.testing.assert_array_equal(got.verdict, expected.verdict)


def test_turns_beyond_the_teachers_positions_are_not_judged(
    params: model.Params, behind: Judge
) -> None:
    played = talk(behind, 0, "." * 12)
    assert len(played.tokens) > behind.model.max_positions
    short = talk(behind, 1, "..")
    got = judged(params, [played, short], by=behind, max_turns=12)
    late = got.too_long[0].tolist()
    assert late == sorted(late)
    assert 0 < sum(late) < 12
    assert not got.too_long[1].any()
    # What fits is judged as if the rest were not there.
    kept = late.index(True)
    cut = replace(played, turns=played.turns[:kept], spans=played.spans[:kept])
    alone = judged(params, [cut, short], by=behind, max_turns=12)
    assert got.verdict[:, :kept].tolist() == alone.verdict[:, :kept].tolist()
