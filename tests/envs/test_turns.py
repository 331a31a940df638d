"""Counting turns, and listing commands."""

import pytest

from opd_jax.envs.turns import TurnClock, listed


def test_an_episode_lasts_max_turns_unless_it_ends_before() -> None:
    clock = TurnClock(3)
    for ends, told in (
        (["", "", ""], ["", "", "turn_limit"]),
        (["", "success"], ["", "success"]),
        (["", "", "success"], ["", "", "success"]),  # the goal still counts in the last turn
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


def test_commands_that_are_not_listed_are_counted() -> None:
    commands = ("take", "open", "look")
    lines = (" (+3 more)", "take (+2 more)", "take, open (+1 more)", "take, open, look")
    for most, line in enumerate((*lines, lines[-1])):
        assert listed(commands, most) == line
