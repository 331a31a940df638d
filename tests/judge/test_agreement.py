"""A judge's verdicts beside an environment's labels, against counts by hand."""

import json

import numpy as np
import pytest

from opd_jax.agent.conversation import Conversation, Turn
from opd_jax.judge import agreement
from opd_jax.judge.verdicts import Judgement
from opd_jax.losses import Verdict

SKIP, WEAK, STRONG, DET_FAIL = (int(v) for v in Verdict)

# Oracle's label, the judge's, for turns 0, 1, 2. A deterministic failure is never asked about, and
# an environment may have no label.
JUDGED = [
    [("SKIP", SKIP), ("SKIP", WEAK), ("STRONG", STRONG)],
    [("WEAK", WEAK), ("", DET_FAIL)],
    [("STRONG", SKIP), ("WEAK", STRONG), ("", STRONG)],
]


def judged() -> tuple[Judgement, list[Conversation]]:
    verdict = np.full((3, 4), SKIP, np.int32)  # K = 4: no episode has a fourth turn
    asked = np.zeros((3, 4), bool)
    conversations = []
    for row, pairs in enumerate(JUDGED):
        made = Conversation(task=None, end="turn_limit")
        for index, (oracle, given) in enumerate(pairs):
            verdict[row, index] = given
            asked[row, index] = given != DET_FAIL
            failure = "rejected" if given == DET_FAIL else ""
            made.turns.append(Turn("", (), "", "stop_token", "look", failure, "", oracle))
        conversations.append(made)
    return Judgement(verdict, asked, np.zeros((3, 4), bool)), conversations


def test_turns_are_counted_where_both_gave_a_label() -> None:
    counts = agreement.confusion(*judged())
    # Rows: the oracle's SKIP, WEAK, STRONG; columns: the judge's.
    assert counts[0].tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert counts[1].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert counts.sum(axis=0).tolist() == [[1, 1, 0], [0, 1, 1], [1, 0, 1]]


def test_figures_by_hand() -> None:
    figures = agreement.figures(agreement.confusion(*judged()))
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
    with pytest.raises(ValueError, match="oracle"):
        agreement.figures(np.zeros((2, 3, 3), int))
