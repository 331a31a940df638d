"""Controls: which turns they drop, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.agent.conversation import Conversation, Turn
from opd_jax.configs import controls
from opd_jax.envs.base import BROKEN, Task
from opd_jax.judge.labels import repeats
from opd_jax.losses import NO_TURN, Verdict

TASK = Task("task", "kind", "goal", "scene")
SKIP, WEAK, STRONG, FAIL = Verdict


def episode(*turns: tuple[str, str, str], end: str = "success") -> Conversation:
    """Turns as (action, failure, label)."""
    made = [
        Turn("seen", (), "said", "stop_token", action, failure, "heard", label)
        for action, failure, label in turns
    ]
    return Conversation(TASK, turns=made, end=end)


BATCH = [
    episode(("a", "", "SKIP"), ("a", "no", ""), ("b", "no", ""), ("", "no", ""), ("", "no", "")),
    episode(("c", "", "STRONG"), ("d", "", "WEAK"), ("d", "", "SKIP")),
    episode(("e", "no", ""), ("e", "", "SKIP"), end=BROKEN),
]


def test_a_turn_repeats_the_action_just_before_it() -> None:
    want = [[0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(repeats(BATCH, max_turns=6), want)


def test_as_many_accepted_turns_are_dropped_as_were_rejected() -> None:
    drawn = [controls.drop_accepted(BATCH, update)[0] for update in range(20)]
    for verdict in drawn:
        # Four were rejected, and four were not.
        assert (verdict == SKIP).sum() == 4
        assert (verdict[:2, :1] == SKIP).all()
    assert (controls.drop_accepted(BATCH[1:], 0)[0] == STRONG).all()
    some = [*BATCH, episode(("f", "", "SKIP"), ("g", "", "SKIP"))]
    assert len({controls.drop_accepted(some, n)[0].tobytes() for n in range(20)}) > 1
    np.testing.assert_array_equal(*(controls.drop_accepted(some, 3)[0] for _ in range(2)))


def test_labels_are_shuffled_over_the_turns_that_were_not_rejected() -> None:
    places = (0, 0), (1, 0), (1, 1), (1, 2)
    seen = set()
    for update in range(30):
        verdict, _ = controls.shuffled(BATCH, update)
        given = [int(verdict[place]) for place in places]
        assert sorted(given) == [SKIP, SKIP, WEAK, STRONG]
        seen.add(tuple(given))
    assert len(seen) > 6


@pytest.mark.parametrize(
    ("weight", "want"),
    [
        (controls.first_failures, [1, 1, 0, 1, 1]),
        (controls.repeated_failures, [1, 1, 1, 0, 1]),
    ],
)
def test_only_first_or_only_repeated_failures_are_dropped(weight, want: list[int]) -> None:
    turn_id = jnp.array([[0, 1, 2, 3, 4, NO_TURN]])
    verdict = jnp.array([[SKIP, SKIP, FAIL, FAIL, STRONG]])
    repeat = jnp.array([[0, 1, 0, 1, 0]])
    np.testing.assert_array_equal(
        weight(turn_id, verdict=verdict, repeats=repeat)[0, :5], np.float32(want)
    )


@pytest.mark.parametrize(
    ("weight", "want"),
    [
        (controls.right_failures, [1, 0.25, 0, 1, 1]),
        (controls.wrong_failures, [1, 0.75, 0, 0, 1]),
    ],
)
def test_rejected_turns_weigh_by_the_teachers_own_turn(weight, want: list[float]) -> None:
    turn_id = jnp.array([[0, 1, 2, 3, 4, NO_TURN]])
    verdict = jnp.array([[SKIP, FAIL, FAIL, FAIL, STRONG]])
    reliability = jnp.array([[0, 0.25, jnp.nan, 1, jnp.nan]])  # NaN: not known
    np.testing.assert_array_equal(
        weight(turn_id, verdict=verdict, reliability=reliability)[0, :5], np.float32(want)
    )
