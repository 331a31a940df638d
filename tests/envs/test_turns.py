"""Counting turns, finding invented ones, and listing commands."""

import pytest

from opd_jax.envs.turns import TurnClock, before_invented_turn, invented_turn, listed


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


@pytest.mark.parametrize(
    "opening",
    [
        *("Observation:", "OBSERVATION 1:", "Observation #2 :", "obs:", "  Environment:", "env:"),
        *("System:", "system message:", "Tool:", "Tool output:", "tool_response:", "Feedback:"),
        *("User:", "  Human: ", "Assistant:", "assistant 2:"),
        *("**Observation:**", "**Observation**:", "__User__:", "* Observation:", "## Human:"),
        *("### Observation\n", "**Observation 3**\n", "# __user__\n", "[Observation]", "[USER 1]"),
        *("<observation>", "<Tool_Response>", "<tool result>", "</observation>", "<user>"),
        *("<|im_start|>user", "<|user|>", "<|eot_id|>", "<start_of_turn>model"),
        *("[INST]", "[/INST]", "<<SYS>>"),
    ],
)
def test_an_invented_turn_begins_a_line(opening: str) -> None:
    acts = "Thought: a.\nAction: look\n"
    assert before_invented_turn(f"{acts}{opening} You see", invented_turn()) == (acts, True)
    spoken = f"Thought: by the {opening.strip()} I mean more.\nAction: look"
    assert before_invented_turn(spoken, invented_turn()) == (spoken, False)


@pytest.mark.parametrize(
    "line",
    [
        *(
            "Observation of the desk comes next.",
            "Users: two.",
            "The user: me.",
            "Toolbox: open it.",
        ),
        *(
            "### Observation of the room",
            "<think>",
            "<tool_call>",
            "<|thinking|>",
            "<action>",
            "[desk 1]",
            "1 < 2",
        ),
        *("Environments: many", "User", "Result: good.", "Thought: b.", "Action: b", "* Plan: go"),
    ],
)
def test_an_honest_line_begins_no_turn(line: str) -> None:
    spoken = f"Thought: a.\n{line}\nAction: look"
    assert before_invented_turn(spoken, invented_turn()) == (spoken, False)


def test_an_invented_observation_may_go_on_in_the_line_of_the_action() -> None:
    pattern = invented_turn()
    for said in ("Action: look", "Thought: the last Observation: a desk.\nAction: go to desk 1"):
        for more in ("Observation: a desk\nAction: go", "OBS 2: a desk Action: go"):
            assert before_invented_turn(f"{said} {more}", pattern) == (f"{said} ", True)
    for honest in ("Action: look", "Action: note observation", "Action: Observation: a desk"):
        assert before_invented_turn(honest, pattern) == (honest, False)


def test_a_response_may_begin_with_the_name_of_the_one_who_speaks() -> None:
    pattern = invented_turn(others=("result",), own=("you",))
    for name in ("Assistant:", "**You:**", "[assistant]"):
        spoken = f"{name} look\n"
        assert before_invented_turn(f"\n{spoken}", pattern) == (spoken, False)
        assert before_invented_turn(f"<think>a</think>\n\n{spoken}", pattern) == (spoken, False)
        assert before_invented_turn(f"{spoken}{name} go", pattern) == (spoken, True)
    assert before_invented_turn("look\nresult 1: a door", pattern) == ("look\n", True)


def test_commands_that_are_not_listed_are_counted() -> None:
    commands = ("take", "open", "look")
    lines = (" (+3 more)", "take (+2 more)", "take, open (+1 more)", "take, open, look")
    for most, line in enumerate((*lines, lines[-1])):
        assert listed(commands, most) == line
