"""Verdicts of an update's turns: figures of the judge by hand, and when it is asked twice."""

import numpy as np
import pytest

from opd_jax.agent.conversation import Conversation, Turn
from opd_jax.config import build, load
from opd_jax.config.models import load_teacher
from opd_jax.config.settings import read_settings
from opd_jax.envs.base import Task
from opd_jax.judge.agreement import judge_metrics
from opd_jax.judge.labels import EnvLabels, env_labels
from opd_jax.judge.verdicts import Judgement
from opd_jax.losses import Verdict
from opd_jax.runtime.mesh import make_mesh

SKIP, WEAK, STRONG, DET_FAIL = (int(v) for v in Verdict)
K = 4  # no episode has a fourth turn

# The oracle's label and the judge's, of turns 0, 1, 2. A turn that failed is never asked about.
JUDGED = [
    [("SKIP", SKIP), ("SKIP", WEAK), ("STRONG", STRONG)],
    [("WEAK", WEAK), ("", DET_FAIL)],
    [("STRONG", SKIP), ("WEAK", STRONG), ("", STRONG)],
]


def judged(*, oracle: bool = True) -> tuple[Judgement, EnvLabels]:
    verdict = np.full((3, K), SKIP, np.int32)
    asked = np.zeros((3, K), bool)
    conversations = []
    for row, pairs in enumerate(JUDGED):
        made = Conversation(task=Task("id", "type", "goal", "scene"), end="turn_limit")
        for index, (label, given) in enumerate(pairs):
            verdict[row, index], asked[row, index] = given, given != DET_FAIL
            failure = "rejected" if given == DET_FAIL else ""
            label = label if oracle else ""
            made.turns.append(
                Turn("seen", (), "Action: go", "stop_token", "go", failure, "heard", label)
            )
        conversations.append(made)
    unparsable = np.zeros((3, K), bool)
    unparsable[2, 2] = True
    return Judgement(verdict, asked, unparsable), env_labels(conversations, max_turns=K)


def test_figures_of_the_judge() -> None:
    metrics = judge_metrics(*judged())
    by_turn = {name: metrics.pop(name) for name in list(metrics) if name.startswith("by_turn/")}
    assert metrics == {
        "judge/asked": (7, 8),
        "judge/unparsable": (1, 7),
        "verdict/skip": (2, 8),
        "verdict/weak": (2, 8),
        "verdict/strong": (3, 8),
        "verdict/det_fail": (1, 8),
        # Of those with a label it wants weak, strong, weak, strong corrected. The first is fine.
        "judge/precision": (3, 4),
        # Strong, weak, strong and weak are not fine. It skips the third.
        "judge/recall": (3, 4),
        "judge/corrected": 4,
        "judge/wrong": 4,
        "judge/recall_skip": (1, 2),
        "judge/recall_weak": (1, 2),
        "judge/recall_strong": (1, 2),
    }
    assert {name: total.tolist() for name, (total, _) in by_turn.items()} == {
        "by_turn/skip": [2, 0, 0, 0],
        "by_turn/weak": [1, 1, 0, 0],
        "by_turn/strong": [0, 1, 2, 0],
        "by_turn/det_fail": [0, 1, 0, 0],
    }
    assert all(count.tolist() == [3, 3, 2, 0] for _, count in by_turn.values())


def test_without_labels_of_an_oracle_nothing_is_said_of_precision() -> None:
    metrics = judge_metrics(*judged(oracle=False))
    assert not any(name.startswith(("judge/precision", "judge/recall")) for name in metrics)


@pytest.mark.usefixtures("compile_quickly")
def test_the_other_decoding_is_asked_every_so_many_updates(small: tuple[str, ...]) -> None:
    mesh = make_mesh(data=1, fsdp=1, tensor=1)
    turns = [Turn("seen", (), "Action: go", "stop_token", "go", "", "heard", "WEAK")]
    played = [Conversation(Task("id", "type", "goal", "scene"), end="success", turns=turns)]
    verdicts, asked = [], []
    for every in (2, 0):
        flags = [*small, f"--config.judge.agreement_every={every}"]
        settings = read_settings(load("quickstart:runlocal", flags))
        label = build.make_labeller(settings, load_teacher(settings, mesh))
        for update in range(3):
            verdict, metrics = label(played, update)
            assert metrics["judge/asked"] == (1, 1)
            verdicts.append(verdict.tolist())
            if "judge/decodings_agree" in metrics:
                asked.append((every, update))
                assert "judge/unparsable_generate" in metrics
    assert asked == [(2, 0), (2, 2)]
    # The second decoding is compared with the first, whose verdicts stay.
    assert len(set(map(str, verdicts))) == 1
