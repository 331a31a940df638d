"""A teacher that is told more than the student: its tokens, its scores, and whole updates."""

import dataclasses
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from buckets import BUCKET, another_process, served
from settings import one_device, read
from test_demonstrations import MAX_TURNS, messages, written

from opd_jax import model
from opd_jax.agent.chat import ChatFormat
from opd_jax.agent.conversation import Conversation, Turn
from opd_jax.config import build
from opd_jax.config.models import LoadedModel, load_student, load_teacher
from opd_jax.config.references import fingerprints
from opd_jax.config.settings import Settings
from opd_jax.envs.household import tokenizer as household_tokenizer
from opd_jax.experience.asides import TeacherContext, record, solved, with_asides
from opd_jax.experience.source import Played
from opd_jax.learner.batch import Batch
from opd_jax.learner.train_state import init_state
from opd_jax.losses import NO_TURN, Verdict
from opd_jax.runtime import bucket

__all__ = ["served"]
pytestmark = pytest.mark.usefixtures("compile_quickly")

ASIDES = ("a shelf 1 is closed.", "", "you are carrying nothing.", "open the drawer 2.")


def hints(conversation: Conversation, *, every: int = 1) -> Sequence[str]:
    """Another text for each turn; every other one is empty where `every` is 2."""
    return [f"go to shelf {k % 5 + 1}." * (k % every == 0) for k in range(len(conversation.turns))]


def unlike(conversation: Conversation) -> Sequence[Any]:
    return [None]


def settings_with(*changes: str) -> Settings:
    by = "teacher_context.by=test_asides:hints"
    return read("quickstart:runlocal", "rollout.batch=4", "env.max_turns=4", by, *changes)


# --- Its tokens -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat.from_tokenizer(household_tokenizer.build(phrases=[]))


@pytest.mark.parametrize("distraction", [0.0, 0.4])
def test_the_teacher_reads_the_rendered_chat_with_its_asides(
    chat: ChatFormat, distraction: float
) -> None:
    made = written(chat, 1, distraction=distraction)
    said = messages(1, [turn.response for turn in made.turns])
    for aside, message in zip(ASIDES, said[1::2], strict=False):
        message["content"] += f"\n{aside}" if aside else ""
    rendered = chat.tokenizer.apply_chat_template(said, tokenize=False).removesuffix("\n")
    told = with_asides(made, ASIDES, chat=chat, most=1000)
    assert told.tokens == chat.tokenizer.encode(rendered, add_special_tokens=False)
    assert len(told.tokens) > len(made.tokens)
    for name in ("tokens", "turn_id", "logprobs"):  # the student's are those it sampled
        mine, theirs = (
            [x for x, turn in zip(getattr(c, name), c.turn_id, strict=True) if turn != NO_TURN]
            for c in (made, told)
        )
        assert mine == theirs


def test_without_an_aside_the_tokens_are_the_very_same(chat: ChatFormat) -> None:
    made = written(chat, 1)
    for none in ((), ("",), [""] * MAX_TURNS):
        assert with_asides(made, none, chat=chat, most=1) == made


def test_an_aside_that_is_too_long_is_left_out(
    chat: ChatFormat, caplog: pytest.LogCaptureFixture
) -> None:
    made = written(chat, 1)
    added = len(with_asides(made, ASIDES, chat=chat, most=1000).tokens) - len(made.tokens)
    assert with_asides(made, ASIDES, chat=chat, most=added) != made
    assert with_asides(made, ASIDES, chat=chat, most=added - 1) is made
    assert f"would read {added} tokens more in household/" in caplog.text


# --- Its scores -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> tuple[LoadedModel, LoadedModel]:
    settings = settings_with()
    teacher = load_teacher(settings, one_device())
    assert teacher is not None
    return load_student(settings, one_device()), teacher


def played(settings: Settings, pair: tuple[LoadedModel, LoadedModel]) -> tuple[Played, Batch]:
    """An update's episodes and their batch, every turn STRONG."""
    tasks = build.panels(settings)[settings.data.split]
    source = build.make_source(settings, *pair, tasks=tasks)
    state = init_state(pair[0].params, build.optimizer(settings), seed=0)
    found = source.play(state)
    verdict = np.full((len(found.conversations), settings.env.max_turns), Verdict.STRONG)
    return found, build.make_pack(settings, pair[0].config)(found, verdict.astype(np.int32))


@pytest.mark.parametrize(
    "changes", [(), ("train.micro_batches=2",), ("rollout.history_turns=1",)], ids=str
)
def test_a_token_is_scored_where_the_teacher_has_it(
    pair: tuple[LoadedModel, LoadedModel], changes: tuple[str, ...]
) -> None:
    settings = settings_with(*changes)
    student, teacher = pair
    found, batch = played(settings, pair)
    assert batch.teacher_tokens is not None
    assert batch.teacher_response is not None
    state = init_state(student.params, build.optimizer(settings), seed=0)
    _, teacher_pass = build.compile_update(
        settings, student=student.config, teacher=teacher.config, placement=None
    )
    assert teacher_pass is not None
    hidden = np.asarray(teacher_pass(teacher.params, batch.for_teacher()))
    forward = jax.jit(partial(model.forward, config=teacher.config, query_chunk=64, remat="none"))
    alone = np.asarray(forward(teacher.params, batch.teacher_tokens))
    scored = 0
    for row, told in enumerate(found.teacher_rows or ()):
        places = [t for t, turn in enumerate(told.turn_id) if turn != NO_TURN]
        scored += len(places)
        for slot, place in enumerate(places):
            assert told.tokens[place] == batch.tokens[row, batch.response[row, slot]]
            np.testing.assert_allclose(hidden[row, slot], alone[row, place - 1], atol=2e-5)
        assert not hidden[row, len(places) :].any()
    assert scored == (batch.turn_id != NO_TURN).sum() > 0
    # The whole update takes it.
    _, raw = build.make_update(settings, *pair, state)(state, batch, None)
    assert raw["sums"].totals.tokens == scored
    assert np.isfinite(raw["loss"])


def test_a_student_that_is_its_own_teacher_learns_from_what_it_was_not_told(
    pair: tuple[LoadedModel, LoadedModel],
) -> None:
    itself = pair[0], pair[0]
    divergence = {}
    for by in ("", "test_asides:hints"):
        settings = settings_with("weight.by=uniform", f"teacher_context.by={by}")
        _, batch = played(settings, itself)
        state = init_state(pair[0].params, build.optimizer(settings), seed=0)
        state = jax.tree.map(lambda x: x.copy(), state)
        _, raw = build.make_update(settings, *itself, state)(state, batch, None)
        divergence[by] = raw["sums"].divergence.sum() / raw["sums"].totals.tokens
    assert abs(divergence[""]) < 1e-6 < 1e-3 < divergence["test_asides:hints"]


def test_rows_with_other_tokens_of_the_students_are_refused(
    pair: tuple[LoadedModel, LoadedModel],
) -> None:
    settings = settings_with()
    found, _ = played(settings, pair)
    rows = list(found.teacher_rows or ())
    place = next(t for t, turn in enumerate(rows[1].turn_id) if turn != NO_TURN)
    other = list(rows[1].tokens)
    other[place] += 1
    rows[1] = dataclasses.replace(rows[1], tokens=other)
    verdict = np.zeros((len(found.conversations), 4), np.int32)
    with pytest.raises(ValueError, match="`teacher_rows`: row 1 has other tokens"):
        build.make_pack(settings, pair[0].config)(
            dataclasses.replace(found, teacher_rows=rows), verdict
        )


# --- Solved tasks ---------------------------------------------------------------------------------


def test_the_record_before_each_turn() -> None:
    turn = Turn("seen", (), "said", "stop_token", "act", "", "heard", "")
    tried = ("go to shelf 1: done", "take apple 1: refused")
    later = dataclasses.replace(turn, record={"tried": tried, "held": ("apple 1",)})
    first, second = record(Conversation(None, turns=[turn, later]))
    assert first == "Tried: nothing\nSeen: nothing\nChanged: nothing\nHeld: nothing"
    assert second == (
        "Tried: go to shelf 1: done; take apple 1: refused\n"
        "Seen: nothing\nChanged: nothing\nHeld: apple 1"
    )
    by = "teacher_context.by=record"
    read("quickstart", by)
    with pytest.raises(ValueError, match=r"environment's record, and `env.by` = 'gymnasium'"):
        read("quickstart", "env.by=gymnasium", by)


def solved_file(path: Path, *tasks: tuple[str, str, bool]) -> str:
    lines = [
        {
            "messages": [
                {"role": "system", "content": "rules"},
                {"role": "user", "content": f"scene of {name}"},
                {"role": "assistant", "content": f"act in {name}"},
            ],
            "task": {"id": name, "kind": kind},
            "success": success,
        }
        for name, kind, success in tasks
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_a_solved_task_of_the_same_type_and_never_the_same_task(
    chat: ChatFormat, tmp_path: Path
) -> None:
    made = written(chat, 1)
    assert made.task
    kind = made.task.type
    tasks = ("b", kind, True), ("c", "other", True), ("d", kind, False), (made.task.id, kind, True)
    (text,) = solved(made, file=solved_file(tmp_path / "some.jsonl", *tasks))
    assert text == "Such a task was solved so:\nscene of b\nact in b"
    assert solved(made, file=solved_file(tmp_path / "none.jsonl", *tasks[1:])) == ()
    with pytest.raises(ValueError, match=r"`teacher_context.file` = .*no episode that succeeded"):
        solved(made, file=solved_file(tmp_path / "failed.jsonl", tasks[2]))


def test_solved_tasks_may_lie_in_a_bucket(chat: ChatFormat, tmp_path: Path, served: Any) -> None:
    def known(file: str) -> str:
        by = ("teacher_context.by=solved", f"teacher_context.file={file}")
        return fingerprints(read("quickstart:runlocal", *by))["teacher_context.file"]

    made = written(chat, 1)
    assert made.task
    file = solved_file(tmp_path / "some.jsonl", ("b", made.task.type, True))
    another_process()
    url = f"gs://{BUCKET}/solved/some.jsonl"
    there = bucket.place(url, name="--out", is_new=True)
    bucket._blob(there).upload_from_filename(file)
    assert solved(made, file=url) == solved(made, file=file) != ()
    assert known(url) == known(file)
    another_process()


# --- Mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "text"),
    [
        (("solve", 9, ""), "`teacher_context.by`: expected one of record, solved, or module:name"),
        (("solved", 9, ""), "`teacher_context.by` = 'solved' .* name it in `teacher_context.file`"),
        (("", 9, "", (("each", 1),)), "`teacher_context.each`: nothing takes it"),
        (("test_asides:hints", 0, ""), "`tokens`: expected at least 1, got 0"),
        (("test_asides:hints", 9, "", (("each", 1),)), "`teacher_context.each` is none of its"),
    ],
)
def test_a_context_that_does_not_fit_is_named(context: tuple, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TeacherContext(*context)


def test_asides_that_are_no_text_are_named(chat: ChatFormat) -> None:
    made = written(chat, 1)
    with pytest.raises(ValueError, match=r"expected a text for each turn, got .None"):
        with_asides(made, unlike(made), chat=chat, most=9)


def test_a_context_beyond_the_teachers_positions_is_refused_before_anything_is_loaded() -> None:
    settings = settings_with("teacher_context.tokens=2000")
    with pytest.raises(ValueError, match=r"`teacher_context.tokens` = 2000 exceed the 2048"):
        build.check_named(settings)


def test_the_function_on_the_page_runs(
    chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "teacher_context.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "on_the_context_page.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    asides = TeacherContext("on_the_context_page:hindsight", 9, "", (("after", 1),)).asides()
    assert asides is not None
    made = written(chat, 1)
    first, second, *_ = asides(made)
    assert first == ""
    assert second.endswith(f": {made.turns[1].feedback}")
