"""Settings of an agent refuse what cannot be played, and the depth of episodes grows."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from small_agent import DECODING

from opd_jax.agent.agent import RolloutSettings

ROLLOUT = RolloutSettings(
    **asdict(DECODING),
    batch=8,
    rows=0,
    gather_weights=True,
    per_task=2,
    depth_start=0,
    depth_every=1,
    depth_from="front",
    teacher_share=0.0,
    teacher_share_for=0.8,
    take_over_after=0,
    cut_repeated_failure=False,
)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "^`temperature`: expected at least 0, got -0.1"),
        ({"top_k": -1}, "^`top_k`: expected at least 0, got -1"),
        ({"top_p": 0.0}, "^`top_p`: expected above 0 and at most 1, got 0.0"),
        ({"top_p": 1.01}, "^`top_p`: expected above 0 and at most 1, got 1.01"),
        ({"turn_tokens": 0}, "^`turn_tokens`: expected at least 1, got 0"),
        ({"turn_tokens": 256}, "^`turn_tokens` = 256: expected less than .*`context_tokens` = 256"),
        ({"prefill_rows": 0}, "^`prefill_rows`: expected at least 1, got 0"),
        ({"chunk": 0}, "^`chunk`: expected at least 1, got 0"),
        ({"history_turns": -1}, "^`history_turns`: expected at least 0, got -1"),
        ({"extend_widths": ()}, r"^`extend_widths`: expected ascending widths, got \[\]"),
        ({"extend_widths": (8, 4)}, r"^`extend_widths`: .*got \[8, 4\]"),
        ({"extend_widths": (4, 4)}, r"^`extend_widths`: .*got \[4, 4\]"),
        ({"extend_widths": (0, 4)}, r"^`extend_widths`: .*got \[0, 4\]"),
        ({"batch": 0}, "^`batch`: expected at least 1, got 0"),
        ({"batch": 7}, "^`batch` = 7 is not a multiple of `per_task` = 2"),
        ({"per_task": 0}, "^`per_task`: expected at least 1, got 0"),
        ({"depth_start": -1}, "^`depth_start`: expected at least 0, got -1"),
        ({"depth_every": 0}, "^`depth_every`: expected at least 1, got 0"),
        ({"depth_from": "middle"}, "^`depth_from`: expected one of front, back, got 'middle'"),
        ({"teacher_share": 1.5}, r"^`teacher_share`: expected 0\.\.1, got 1.5"),
        ({"teacher_share_for": -0.1}, r"^`teacher_share_for`: expected 0\.\.1, got -0.1"),
        ({"take_over_after": -1}, "^`take_over_after`: expected at least 0, got -1"),
    ],
)
def test_a_value_out_of_range_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ROLLOUT, **wrong)


def test_a_batch_has_at_most_its_episodes_at_once() -> None:
    assert [replace(ROLLOUT, rows=rows).at_once for rows in (0, 3, 8, 9)] == [8, 3, 8, 8]


def test_episodes_may_grow_by_a_turn_every_few_updates() -> None:
    growing = replace(ROLLOUT, depth_start=2, depth_every=3)
    assert [growing.depth(update) for update in range(7)] == [2, 2, 2, 3, 3, 3, 4]
    assert {ROLLOUT.depth(update) for update in range(7)} == {0}  # no limit


def test_the_teachers_share_of_turns_falls_along_a_cosine() -> None:
    guided = replace(ROLLOUT, teacher_share=1.0)
    shares = [guided.share_of_teacher(update, updates=10) for update in range(10)]
    # In 8 of 10 updates; cos is 1, √½ and 0 in updates 0, 2 and 4.
    np.testing.assert_allclose(shares[:5:2], [1.0, (1 + 0.5**0.5) / 2, 0.5])
    np.testing.assert_allclose(shares[:9], 1 - np.array(shares[8::-1]))
    assert shares[8:] == [0.0, 0.0]
    half = replace(guided, teacher_share=0.5)
    np.testing.assert_allclose(
        [half.share_of_teacher(update, updates=10) for update in range(10)], np.array(shares) / 2
    )
    constant = replace(guided, teacher_share=0.25, teacher_share_for=0.0)
    assert {constant.share_of_teacher(update, updates=10) for update in range(10)} == {0.25}
    assert ROLLOUT.share_of_teacher(0, updates=10) == 0
    by_failure = replace(ROLLOUT, take_over_after=2)
    assert [how.teacher_plays for how in (ROLLOUT, guided, by_failure)] == [False, True, True]
