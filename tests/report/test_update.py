"""The line of an update: how its episodes went, what was learnt, and which metrics are left out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from settings import read

from opd_jax.agent.conversation import Conversation, Turn
from opd_jax.envs.base import BROKEN, Task
from opd_jax.report.update import check_finite, describe, episode_metrics, unmeasured


def turn(action: str = "look", *, failure: str = "", stop: str = "stop_token") -> Turn:
    return Turn("seen", (), f"Action: {action}", stop, action, failure, "heard", "")


def conversation(turns: Sequence[Turn], *, end: str, score: float, tokens: int) -> Conversation:
    """The first token is given, the rest belong to turn 0."""
    made = Conversation(task=Task("id", "type", "goal", "scene"), end=end, score=score)
    made.append_given([1])
    made.append_response([2] * (tokens - 1), [-1.0] * (tokens - 1), 0)
    made.turns.extend(turns)
    return made


EPISODES = [
    conversation(
        [turn("go"), turn("take"), turn("go", stop="turn_budget")],
        end="success",
        score=1.0,
        tokens=9,
    ),
    conversation(
        [turn("go", failure="rejected"), turn("", failure="no_action", stop="turn_budget")],
        end="turn_limit",
        score=0.25,
        tokens=5,
    ),
    conversation([turn("look", stop="context")], end="context", score=0.0, tokens=2),
    conversation([turn("look"), turn("look")], end="turn_limit", score=0.0, tokens=4),
]


def test_figures_of_a_batch_of_episodes() -> None:
    assert episode_metrics(EPISODES, EPISODES) == {
        "batch/success": (1, 4),
        "batch/score": (1.25, 4),
        "batch/turns": (8, 4),
        # The second `go` and the second `look`; a turn without an action repeats none.
        "batch/repeated": (2, 8),
        "batch/failed": (2, 8),
        "batch/by_teacher": (0, 8),
        "batch/replayed": (0, 8),
        "end/success": (1, 4),
        "end/turn_limit": (2, 4),
        "end/context": (1, 4),
        "stop/invented_turn": (0, 8),
        "stop/stop_token": (5, 8),
        "stop/turn_budget": (2, 8),
        "stop/context": (1, 8),
        "tokens/sampled": 8 + 4 + 1 + 3,
        "tokens/by_teacher": 0,
        "tokens/sequence": 9 + 5 + 2 + 4,
    }


def test_an_episode_that_does_not_fit_counts_as_context_and_nowhere_else() -> None:
    unfit = Conversation(task=None, end="context")
    whole, found = (episode_metrics(e, e) for e in (EPISODES, [*EPISODES, unfit]))
    before, after = whole.pop("end/context"), found.pop("end/context")
    assert (after[0], after[1]) == (before[0] + 1, before[1] + 1)
    assert {k: v for k, v in found.items() if k[:4] != "end/"} == {
        k: v for k, v in whole.items() if k[:4] != "end/"
    }


def test_an_episode_whose_environment_broke_counts_as_broken_and_nowhere_else() -> None:
    broken = conversation([turn("go")], end=BROKEN, score=0.0, tokens=3)
    whole, found = (episode_metrics(e, e) for e in (EPISODES, [*EPISODES, broken]))
    ends = {name: count for name, count in found.items() if name.startswith("end/")}
    assert ends.pop("end/broken") == (1, 5)
    assert {name: total for name, (total, _) in ends.items()} == {
        name: whole[name][0] for name in ends
    }
    # Its tokens lie in the batch all the same, as padding does.
    assert found.pop("tokens/sequence") == whole.pop("tokens/sequence") + 3
    assert {n: v for n, v in found.items() if not n.startswith("end/")} == {
        n: v for n, v in whole.items() if not n.startswith("end/")
    }


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("quickstart", set()),
        ("quickstart:method=opd", {"seconds/judge", "confidence", "by_turn/confidence"}),
        ("quickstart:ablate=confidence", {"confidence", "by_turn/confidence"}),
        (
            "quickstart:method=sft",
            {
                *("seconds/judge", "confidence", "by_turn/confidence"),
                *("teacher_entropy", "logprob_error"),
            },
        ),
    ],
)
def test_what_is_not_computed_is_left_out(name: str, names: set[str]) -> None:
    settings = read(name)
    on_policy = settings.data.source == "on_policy"
    how = dict(on_policy=on_policy, replays=True, teacher_plays=True)
    assert unmeasured(settings.objective, **how) == names
    assert unmeasured(
        settings.objective, on_policy=on_policy, replays=False, teacher_plays=False
    ) == {
        *names,
        *("batch/replayed", "batch/by_teacher", "tokens/by_teacher", "tokens/read_by_teacher"),
    }


def test_with_a_scale_for_each_trajectory_there_is_no_one_z() -> None:
    settings = read("quickstart", "objective.scope=trajectory")
    names = unmeasured(settings.objective, on_policy=True, replays=True, teacher_plays=True)
    assert names == {"z", "raw_weight", "by_turn/raw_weight"}


def test_a_figure_that_is_not_finite_is_named_with_its_update_and_the_good_checkpoint() -> None:
    good = {"loss": np.float32(0.5), "grad_norm": np.float32(1), "update_norm": np.float32(1)}
    check_finite(good, update=3, checkpoints=Path("runs/x/checkpoints"))
    for name in good:
        with pytest.raises(ValueError, match=rf"`{name}` is nan at update 3: .*runs/x/checkpoints"):
            check_finite(good | {name: np.nan}, update=3, checkpoints=Path("runs/x/checkpoints"))
        with pytest.raises(ValueError, match=r"at update 3: nothing was saved from it; .*lower"):
            check_finite(good | {name: np.nan}, update=3, checkpoints=None)
    for where in ("", "row 2 at token 7"):
        hint = where or "`debug.nans` names the token"
        with pytest.raises(ValueError, match=f"is good; {hint}; lower `opt"):
            check_finite(good | {"loss": np.nan}, update=3, checkpoints=Path("x"), where=where)
        with pytest.raises(ValueError, match="is good; lower `opt"):  # no token's
            check_finite(
                good | {"update_norm": np.inf}, update=3, checkpoints=Path("x"), where=where
            )


def test_the_printed_line_has_what_was_measured() -> None:
    metrics = {"loss": 0.5, "seconds/rollout": 2.0, "seconds/update": 4.0, "seconds/compile": 99.0}
    line = describe(metrics, update=2, updates=12)
    assert line == " 2/12  loss 0.5000  01:00 left"  # ten more updates of 2 + 4 seconds
    # Not every update compiles or looks at episodes: these are no part of the time left.
    rare = {"seconds/compile": 0.0, "seconds/episodes": 9.0}
    assert describe(metrics | rare, update=2, updates=12) == line
    more = {"batch/success": 0.25, "verdict/skip": 0.5, "verdict/weak": 0.25}
    line = describe(metrics | more | {"tokens_per_s/update": 1234.0}, update=2, updates=1002)
    expected = "   2/1002  loss 0.5000  success 25%  skip 50% weak 25%  1.23k tok/s  1:40:00 left"
    assert line == expected
