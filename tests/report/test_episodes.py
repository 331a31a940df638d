"""The episode file: a line from a conversation and its scores, and back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_jax.agent.conversation import Conversation, Message, Turn
from opd_jax.envs.base import Task
from opd_jax.judge.labels import Judgement
from opd_jax.learner.objective import Seen
from opd_jax.losses import NO_TURN, Choices, TokenScores, Verdict
from opd_jax.report.episodes import (
    EpisodeSettings,
    add_judgement,
    add_scores,
    drop_later,
    episode,
    pieces,
    read_episodes,
    scaled,
    update_file,
    write_episodes,
)

WORDS = ["<s>", "<end>", "go", "look", "wait", "room", "door", "key"]


def decode(tokens: Any) -> str:
    return " ".join(WORDS[token] for token in tokens)


def turn(response: str, **fields: Any) -> Turn:
    rest: dict[str, Any] = dict(
        stop="stop_token", action=response, failure="", feedback="", oracle=""
    )
    return Turn("", (), response, **rest | fields)


def played() -> Conversation:
    """Two turns: the first is replayed, the second is the student's."""
    task = Task("hall/train/3", "open", "goal", "scene")
    c = Conversation(task, "train", 3, end="lost", score=0.123456789, measures={"f1": 0.5})
    c.append_given([0, 5])
    c.append_response([3, 1], [0.0, 0.0], NO_TURN)
    c.append_given([6])
    c.append_response([2, 7, 1], [-0.123456789, -0.5, 0.0], 1)
    seen = {"seen": ("room",), "held": ()}
    c.turns = [turn("look", oracle="SKIP"), turn("go key", failure="rejected", record=seen)]
    said = [("user", "room"), ("assistant", "look"), ("user", "door"), ("assistant", "go key")]
    c.messages = [Message(*words) for words in said]
    return c


def line() -> dict[str, Any]:
    return episode(played(), who="train", update=2, actor="student", decode=decode)


def test_a_line_says_what_was_said_and_done() -> None:
    got = line()
    assert got["messages"] == [
        {"role": "user", "content": "room"},
        {"role": "assistant", "content": "look"},
        {"role": "user", "content": "door"},
        {"role": "assistant", "content": "go key"},
    ]
    assert got["task"] == {"split": "train", "index": 3, "id": "hall/train/3", "kind": "open"}
    assert [got[k] for k in ("who", "update", "end", "success")] == ["train", 2, "lost", False]
    assert (got["score"], got["measures"]) == (0.12346, {"f1": 0.5})  # five digits
    done = dict(stop="stop_token")
    assert got["turns"] == [
        {"actor": "replay", "action": "look", "failure": "", "label": "SKIP"} | done,
        {"actor": "student", "action": "go key", "failure": "rejected", "label": ""}
        | done
        | {"record": {"seen": ["room"], "held": []}},
    ]
    assert got["tokens"]["id"] == [0, 5, 3, 1, 6, 2, 7, 1]
    assert got["tokens"]["turn"] == [-1] * 5 + [1] * 3
    assert got["tokens"]["sampled_logprob"][5:] == [-0.12346, -0.5, 0.0]
    assert got["student_tokens"] == {"position": [5, 6, 7], "text": ["go", " key", " <end>"]}


def test_an_episode_of_a_player_has_no_tokens() -> None:
    c = played()
    c.tokens, c.turn_id, c.logprobs, c.spans = [], [], [], []
    got = episode(c, who="expert", update=0, actor="student", decode=decode)
    assert not {"tokens", "student_tokens"} & got.keys()
    assert [turn["actor"] for turn in got["turns"]] == ["student", "student"]


def judgement() -> Judgement:
    verdict = np.array([[0, 0], [Verdict.WEAK, Verdict.DET_FAIL]], np.int32)
    asked = np.array([[True, True], [True, False]])
    scores = np.full((2, 2, 3), np.nan, np.float32)
    scores[1, 0] = -1, -0.25, -2
    none = np.zeros_like(asked)
    return Judgement(verdict, asked, none, none, scores)


def test_verdicts_and_scores_of_words_are_those_of_the_row() -> None:
    got = line()
    add_judgement(got, judgement(), 1)
    first, second = got["turns"]
    assert (first["verdict"], second["verdict"]) == ("WEAK", "DET_FAIL")
    assert first["judge"] == {"SKIP": -1.0, "WEAK": -0.25, "STRONG": -2.0}
    assert "judge" not in second
    # Without a judge every turn counts as STRONG, and none is said to be.
    nobody, nothing = line(), np.zeros((2, 2), bool)
    strong = np.full((2, 2), Verdict.STRONG, np.int32)
    none = Judgement(strong, nothing, nothing, nothing, np.full((2, 2, 3), np.nan))
    add_judgement(nobody, none, 1)
    assert nobody == line()


def seen(*, z: Any = None) -> tuple[Seen, np.ndarray]:
    """Of an episode in two rows, as with `history_turns`: the second has two of three tokens."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    scores = TokenScores(*(x + 10 * n for n in range(6)))
    tokens = np.stack([np.full((2, 3), 6), np.full((2, 3), 7)], axis=-1)
    prob = np.stack([x / 10, x / 100], axis=-1)
    choices = Choices(x > 3, tokens, prob, prob / 2)
    weight = np.array([[0.5, 0, 0], [1.0, np.inf, 0]])
    confidence = np.array([[0.9, 0.0], [0.0, 0.8]])
    found = Seen(scores, choices, weight, np.array([[1.0, 0.5], [1.0, 0.5]]), confidence, z)
    return found, np.array([[True, False, False], [True, True, False]])


def test_scores_of_several_rows_join_in_order() -> None:
    got = line()
    add_scores(got, *seen(), decode)
    tokens = scaled(got, 2.0)["student_tokens"]
    assert tokens["divergence"] == [0.0, 3.0, 4.0]
    assert tokens["student_logprob"] == [20.0, 23.0, 24.0]
    assert tokens["teacher_logprob"] == [30.0, 33.0, 34.0]
    assert tokens["agrees"] == [False, False, True]
    assert tokens["top"][2] == [["door", 0.4, 0.2], ["key", 0.04, 0.02]]
    assert tokens["weight"] == [1.0, 2.0, None]  # z times; JSON has no infinity
    assert scaled(got, 2.0)["z"] == 2.0
    # Only the second turn is the student's.
    assert "confidence" not in got["turns"][0]
    assert (got["turns"][1]["intervention"], got["turns"][1]["confidence"]) == (0.5, 0.8)


def test_a_trajectorys_own_scale_is_in_its_weights_already() -> None:
    got = line()
    add_scores(got, *seen(z=np.array([4.0, 4.0])), decode)
    assert scaled(got, 2.0) == got
    assert (got["z"], got["student_tokens"]["weight"][0]) == (4.0, 0.5)


def test_without_scores_there_is_nothing_to_scale() -> None:
    assert scaled(line(), 2.0) == line()


@pytest.mark.parametrize("text", ["plain words", "naïve — 東京 🙂", "\ufffd left", "🙂", ""])
def test_pieces_are_the_text_however_tokens_cut_its_characters(text: str) -> None:
    def of_bytes(tokens: Any) -> str:
        return bytes(tokens).decode(errors="replace")

    tokens = list(text.encode())
    got = pieces(tokens, of_bytes)
    assert len(got) == len(tokens)
    assert "".join(got) == text
    # Also where the last character is cut short.
    cut = tokens[:-1]
    assert "".join(pieces(cut, of_bytes)) == of_bytes(cut)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    full = line()
    full["messages"][0]["content"] = 'half \ud83d of "an" emoji\n</script>'
    add_judgement(full, judgement(), 1)
    add_scores(full, *seen(), decode)
    path = update_file(tmp_path / "episodes", 7)
    write_episodes(path, [full, line()])
    assert [file.name for file in path.parent.iterdir()] == ["update-000007.jsonl"]
    assert len(path.read_text().splitlines()) == 2
    assert read_episodes(path) == [full, line()]
    # Updates after 6 are done again.
    path.with_name("123.update-000009.jsonl.tmp").touch()
    path.with_name("after-valid.jsonl").touch()
    drop_later(path.parent, 7)
    assert path.exists()
    drop_later(path.parent, 6)
    assert [file.name for file in path.parent.iterdir()] == ["after-valid.jsonl"]


USER, AGENT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "c"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("{", "line 3 of .*not an episode"),
        (json.dumps([USER]), "an object with a list `messages`"),
        (json.dumps({"messages": []}), "an object with a list `messages`"),
        (json.dumps({"messages": [{"role": "tool", "content": "a"}]}), "`role`, system, user"),
        (json.dumps({"messages": [{"role": "user"}]}), "a `content`, a text"),
        (json.dumps({"messages": [AGENT, USER]}), "in turn, .* got assistant, user"),
        (json.dumps({"messages": [USER, SYSTEM, AGENT]}), "in turn"),
        (json.dumps({"messages": [SYSTEM]}), "in turn"),
    ],
)
def test_a_wrong_line_is_named(wrong: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    good = json.dumps({"messages": [SYSTEM, USER, AGENT, USER], "unknown": 1})
    path.write_text(f"{good}\n\n{wrong}\n")
    with pytest.raises(ValueError, match=said) as error:
        read_episodes(path)
    assert f"line 3 of `{path}`" in str(error.value)


def test_a_file_that_is_not_there_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent.*does not exist.*opd_jax.evaluate .*--episodes"):
        read_episodes(tmp_path / "absent")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_episodes(tmp_path / "empty")


def test_settings_are_checked() -> None:
    for wrong in (dict(every=-1), dict(count=0)):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            EpisodeSettings(**dict(every=1, count=1, top=True) | wrong)
