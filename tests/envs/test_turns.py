"""What environments do alike in every turn."""

import pytest

from opd_jax.envs.turns import TurnClock, listed


def test_an_episode_lasts_max_turns_unless_it_ends_before() -> None:
    clock = TurnClock(3)
    for ends, told in (
        (["", "", ""], ["", "", "turn_limit"]),
        (["", "success"], ["", "success"]),
        (["", "", "success"], ["", "", "success"]),  # in the last turn the goal goes before
    ):
        clock.start()
        for why, end in zip(ends, told, strict=True):
            clock.tick()
            assert [clock.end(why), clock.end(why)] == [end, end]
        with pytest.raises(ValueError, match="`step` needs a running episode; call `reset` first"):
            clock.tick()


def test_turns_belong_to_a_running_episode() -> None:
    clock = TurnClock(3)
    with pytest.raises(ValueError, match="call `reset` first"):
        clock.tick()
    clock.start()
    clock.tick()
    clock.stop()
    with pytest.raises(ValueError, match="call `reset` first"):
        clock.tick()
    with pytest.raises(ValueError, match="`max_turns` must be at least 1; got 0"):
        TurnClock(0)


@pytest.mark.parametrize(
    ("most", "line"),
    [(0, " (+3 more)"), (1, "take (+2 more)"), (3, "take, open, look"), (9, "take, open, look")],
)
def test_commands_that_are_not_listed_are_counted(most: int, line: str) -> None:
    assert listed(("take", "open", "look"), most) == line
