"""A judge's verdicts beside an environment's labels, against counts by hand."""

import json

import numpy as np
import pytest

from opd_jax.agent.conversation import Conversation, Turn
from opd_jax.envs.base import BROKEN, Task
from opd_jax.judge import agreement
from opd_jax.judge.labels import NO_LABEL, EnvLabels, Judgement, env_labels
from opd_jax.losses import Verdict

SKIP, WEAK, STRONG, DET_FAIL = (int(v) for v in Verdict)

# The oracle's label and the judge's of turns 0, 1, 2. A deterministic failure is never asked about,
# and an environment may have no label.
JUDGED = [
    [("SKIP", SKIP), ("SKIP", WEAK), ("STRONG", STRONG)],
    [("WEAK", WEAK), ("", DET_FAIL)],
    [("STRONG", SKIP), ("WEAK", STRONG), ("", STRONG)],
]
TASK = Task(id="t/0", type="", goal="", scene="")


def judged() -> tuple[Judgement, EnvLabels]:
    verdict = np.full((3, 4), SKIP, np.int32)  # K = 4: no episode has a fourth turn
    asked = np.zeros((3, 4), bool)
    conversations = []
    for row, pairs in enumerate(JUDGED):
        made = Conversation(TASK, end="turn_limit")
        for index, (oracle, given) in enumerate(pairs):
            verdict[row, index] = given
            asked[row, index] = given != DET_FAIL
            failure = "rejected" if given == DET_FAIL else ""
            made.turns.append(Turn("", (), "", "stop_token", "look", failure, "", oracle))
        conversations.append(made)
    judgement = Judgement(verdict, asked, *np.zeros((2, 3, 4), bool), np.full((3, 4, 3), np.nan))
    return judgement, env_labels(conversations, max_turns=4)


def confusion() -> np.ndarray:
    judgement, labels = judged()
    return agreement.confusion(judgement, labels.oracle)


def test_the_environments_labels_by_hand() -> None:
    _, labels = judged()
    none = NO_LABEL
    assert labels.oracle.tolist() == [
        [SKIP, SKIP, STRONG, none],
        [WEAK, none, none, none],
        [STRONG, WEAK, none, none],
    ]
    assert labels.played.sum(axis=1).tolist() == [3, 2, 3]
    assert np.argwhere(labels.failed).tolist() == [[1, 1]]


def test_rows_that_count_for_nothing_have_no_labels() -> None:
    turns = [Turn("", (), "", "stop_token", "look", "rejected", "", "WEAK")]
    for nothing in (Conversation(TASK, turns=turns, end=BROKEN), Conversation(None)):
        labels = env_labels([nothing], max_turns=1)
        assert not labels.played.any()
        assert not labels.failed.any()
        assert (labels.oracle == NO_LABEL).all()


def test_metrics_by_hand() -> None:
    got = agreement.judge_metrics(*judged())
    shares = {name: value for name, value in got.items() if not name.startswith("by_turn/")}
    assert shares == {
        "judge/asked": (7, 8),
        "judge/too_long": (0, 8),
        "judge/unparsable": (0, 7),
        "verdict/skip": (2, 8),
        "verdict/weak": (2, 8),
        "verdict/strong": (3, 8),
        "verdict/det_fail": (1, 8),
        "judge/precision": (3, 4),
        "judge/recall": (3, 4),
        "judge/corrected": 4,
        "judge/wrong": 4,
        "judge/recall_skip": (1, 2),
        "judge/recall_weak": (1, 2),
        "judge/recall_strong": (1, 2),
    }
    given, turns = got["by_turn/strong"]
    assert (given.tolist(), turns.tolist()) == ([0, 1, 2, 0], [3, 3, 2, 0])


def test_a_sample_is_drawn_by_seed_and_update_and_each_turn_is_as_likely() -> None:
    asked = np.random.default_rng(0).random((6, 5)) < 0.6
    total, most, times = int(asked.sum()), 4, 3000
    samples = [agreement.draw_turns(asked, most=most, seed=(7, n)) for n in range(times)]
    assert all(sample.sum() == most and not (sample & ~asked).any() for sample in samples)
    again = agreement.draw_turns(asked, most=most, seed=(7, 11))
    assert (again == samples[11]).all()
    other = agreement.draw_turns(asked, most=most, seed=(8, 11))
    assert (other != samples[11]).any()
    share = most / total
    found = np.mean(samples, axis=0)[asked]
    assert np.abs(found - share).max() < 5 * np.sqrt(share * (1 - share) / times)
    assert (agreement.draw_turns(asked, most=total + 1, seed=(0, 0)) == asked).all()
    assert not agreement.draw_turns(np.zeros((2, 3), bool), most=4, seed=(0, 0)).any()


def test_turns_are_counted_where_both_gave_a_label() -> None:
    counts = confusion()
    # Rows: the oracle's SKIP, WEAK, STRONG; columns: the judge's.
    assert counts[0].tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert counts[1].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert counts.sum(axis=0).tolist() == [[1, 1, 0], [0, 1, 1], [1, 0, 1]]


def test_figures_by_hand() -> None:
    figures = agreement.figures(confusion())
    # Each label is found once in two. Four of six turns are wanted corrected; all but the first of
    # these are not fine, and of the four that are not fine one was skipped.
    assert figures["balanced_accuracy"] == pytest.approx(1 / 2)
    assert figures["always_skip"] == pytest.approx(1 / 3)
    assert (figures["precision"], figures["recall"]) == (3 / 4, 3 / 4)
    assert figures["n"] == 6
    low, high = figures["ci95"]
    assert 0 <= low < 1 / 2 < high <= 1
    assert json.loads(json.dumps(figures)) == figures


def test_frequent_labels_count_no_more_than_rare_ones() -> None:
    counts = np.array([[900, 100, 0], [0, 0, 0], [0, 5, 5]])
    assert agreement.balanced_accuracy(counts) == pytest.approx((0.9 + 0.5) / 2)
    assert np.isnan(agreement.balanced_accuracy(np.zeros((3, 3), int)))


@pytest.mark.parametrize("answer", [SKIP, WEAK, STRONG])
def test_a_constant_judge_is_right_by_chance(answer: int) -> None:
    counts = np.zeros((3, 3), int)
    counts[:, answer] = [70, 20, 10]
    assert agreement.balanced_accuracy(counts) == pytest.approx(1 / 3)


def test_the_interval_comes_from_episodes_and_narrows_with_their_number() -> None:
    good, bad = np.diag([4, 2, 2]), np.fliplr(np.diag([4, 2, 2]))
    same = agreement.figures(np.stack([good] * 20))
    assert same["ci95"] == [1, 1]  # no episode differs from another

    def width(episodes: int) -> float:
        low, high = agreement.figures(np.stack([good, bad] * (episodes // 2)))["ci95"]
        return high - low

    assert width(8) > 1.5 * width(80) > 0


def test_nothing_corrected_has_no_precision_and_nothing_counted_no_figures() -> None:
    fine = np.array([[[5, 0, 0], [0, 0, 0], [0, 0, 0]]])
    figures = agreement.figures(fine)
    assert (figures["precision"], figures["recall"], figures["always_skip"]) == (None, None, 1)
    nothing = agreement.figures(np.zeros((2, 3, 3), int))
    assert nothing.pop("n") == 0
    assert nothing == dict.fromkeys(figures.keys() - {"n"})
