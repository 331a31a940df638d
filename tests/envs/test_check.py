"""What `envs.check` finds: nothing in what is sound, and each way to break the protocol."""

import broken
import pytest

from opd_jax.envs.check import BREAKS, NOTE, OK, Finding, check, line, main, read_arguments


@pytest.fixture(autouse=True)
def _hashes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)


def found(by: str, *options: str) -> dict[str, Finding]:
    return {finding.what: finding for finding in check(*read_arguments([by, *options]))}


def test_a_sound_environment_with_every_member_has_no_finding() -> None:
    table = found("broken:Sound", "--splits=train,test", "--pace_s=1.5")
    assert {finding.state for finding in table.values()} == {OK}
    assert table["made in a process"].text == "train 100, test 100"
    assert table["answers"].text == "24 episodes of nonsense, random, expert"
    assert table["expert"].text == "it solves 8 of 8 tasks"


# Class -> the check that finds it, and a part of what it says.
BROKEN = {
    "NoArguments": ("name, arguments", "`env.max_turns` is none of its fields"),
    "Unpicklable": ("name, arguments", "expected something that pickles"),
    "Missing": ("name, arguments", "module `broken` has no `Missing`"),
    "RaisesWhenMade": ("made in a process", "RuntimeError: no board (broken.py, line"),
    "NoTasks": ("made in a process", "`size('train')`: expected at least 1, got 0"),
    "SizeIsAFloat": ("made in a process", "expected int, got 100.0"),
    "AnySplit": ("unknown split", "expected a ValueError that names the known splits, got 100"),
    "SplitIsAKey": ("unknown split", "KeyError: 'no such split' (broken.py"),
    "DigestOfHash": ("digest", "in another process: make it of what the tasks depend on"),
    "DigestIsANumber": ("digest", "expected str, got 17"),
    "TasksFromGlobalRandom": ("tasks", "no pure function of (split, index)"),
    "TasksInOrder": ("tasks", "`goal` was 'guess number"),
    "OneId": ("tasks", "have one `id`, 'guess'"),
    "Refuses": ("tasks", "refuses its task: no such number"),
    "HangsInReset": ("tasks", "no answer within"),
    "Hangs": ("answers", "no answer within 0.5 s (`step_timeout_s`)"),
    "Dies": ("answers", "its process was killed by SIGKILL"),
    "ChokesOnNonsense": ("answers", "response '': The environment broke in `step`: IndexError"),
    "AnswersATuple": ("answers", "expected an Observation, got ('It is larger.', 0.0"),
    "AnswersNone": ("answers", "expected an Observation, got None"),
    "TextIsANumber": ("answers", "`text`: expected a text, got 5"),
    "ScoreIsNaN": ("answers", "`score`: expected a finite number, got nan"),
    "AdmissibleIsAGenerator": ("answers", "`admissible`: expected commands, got <generator"),
    "OracleOfItsOwn": ("answers", "expected SKIP, WEAK or STRONG, got 'GOOD'"),
    "ExpertIsMute": ("answers", "player 'expert': expected a text, got None"),
    "NeverEnds": ("end", "goes on after `max_turns` = 8 responses"),
    "Wins": ("end", "expected 'success' where the goal is reached, got 'won'"),
    "HidesText": ("end", "`message` = '?' does not contain `text`"),
    "NoWaits": ("members", "`waits`: expected a bool, got None"),
    "SystemIsNone": ("tasks", "expected str, got None"),
    "GoesOn": ("step after the end", "got Observation(text='Over.'"),
    "StepsFailAfterTheEnd": ("step after the end", "expected a ValueError"),
    "WorldOfStrangers": ("world, figures", "`world` names 'speed', which is none"),
    "InventedIsAText": ("invented", "expected a compiled pattern, got 'Observation:'"),
    "PlayersAreNames": ("players", "expected functions by name"),
    "DeniesLabels": ("labels_turns", "`labels_turns` is False, but"),
    "RecordIsAList": ("tasks", "`record()`: expected lists of texts by name, got []"),
    "RecordWithoutLists": ("record()", "expected lists of texts ['changed', 'held', 'seen', 't"),
    "CopiesItself": ("copy()", "in turn"),
    "LabelsAlike": ("label()", "= 'WEAK', but its step has 'SKIP'"),
    "LabelMoves": ("label()", ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_the_protocol_is_found_and_named(name: str) -> None:
    hangs = ("--step_timeout_s=0.5", "--start_timeout_s=3.0") if "Hangs" in name else ()
    table = found(f"broken:{name}", *hangs)
    what, says = BROKEN[name]
    assert says in table[what].text
    others = {finding.what for finding in table.values() if finding.state == BREAKS}
    assert others == {what}


def test_every_broken_environment_is_tried() -> None:
    made = {name for name, kind in vars(broken).items() if isinstance(kind, type)}
    helpers = {"Sound", "Plain", "Halving", "Mute", "Observation", "Task", "TurnClock", "Any"}
    assert made - helpers - {"ClassVar", "Iterator"} == BROKEN.keys() - {"Missing"}


def test_what_a_sound_environment_lacks_is_a_note() -> None:
    table = found("broken:Plain")
    assert BREAKS not in {finding.state for finding in table.values()}
    notes = {finding.what for finding in table.values() if finding.state == NOTE}
    optional = {"world, figures", "labels_turns", "invented", "expert", "record()", "copy()"}
    assert notes == optional | {"label()", "equal answers", "in this process"}


def test_the_command_prints_a_table_and_ends_with_2_if_something_breaks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["household", "--size=small", "--show_admissible=0", "--splits=train,valid_unseen"])
    out = capsys.readouterr().out
    assert "BREAKS" not in out
    assert out.endswith("`household` keeps the protocol\n")
    with pytest.raises(SystemExit) as ended:
        main(["broken:GoesOn"])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert "step after the end  BREAKS  `step` after the end: expected a ValueError" in out
    assert err == "error: `broken:GoesOn` breaks the protocol in 1 of these checks\n"


@pytest.mark.parametrize("words", [[], ["--splits=train"], ["broken:Sound", "train"]])
def test_a_command_that_names_nothing_ends_with_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_lines_fit_a_terminal() -> None:
    text = line(Finding("digest", BREAKS, "many words " * 40))
    assert max(map(len, text.splitlines())) <= 110
