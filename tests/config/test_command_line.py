"""The command line: a config, a workdir and flags, and mistakes in one line."""

import shlex
from pathlib import Path

import pytest

from opd_jax.config import parse_command_line
from opd_jax.config.flags import written
from opd_jax.config.loading import flatten, load

CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=None):
    return ConfigDict({"seed": 0, "arg": arg, "train": {"learning_rate": 1e-3}})
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "example.py"
    file.write_text(CONFIG)
    return str(file)


def test_a_command_line_gives_config_workdir_and_flags(path):
    words = [f"--config={path}:runlocal", "--workdir", "w", "--config.seed", "3", "--policy=expert"]
    config, workdir, flags = parse_command_line(
        words, usage="", policy=("model", "expert"), tasks=400, verbose=False
    )
    assert (config.seed, config.arg, workdir) == (3, "runlocal", Path("w"))
    assert flags == {"policy": "expert", "tasks": 400, "verbose": False}


def test_a_command_may_have_no_config_and_required_flags():
    words = ["--workdir=w", "--out=o"]
    config, workdir, flags = parse_command_line(words, usage="", needs_config=False, out=str)
    assert (config, workdir, flags) == (None, Path("w"), {"out": "o"})


def test_the_home_directory_is_understood(path, monkeypatch):
    monkeypatch.setenv("HOME", "/people/her")
    _, workdir, _ = parse_command_line([f"--config={path}", "--workdir=~/runs/a"], usage="")
    assert workdir == Path("/people/her/runs/a")


@pytest.mark.parametrize("url", ["hdfs://bucket/run", "s3://b/r", "gs:/bucket/run"])
def test_a_url_is_no_workdir(url, path):
    with pytest.raises(ValueError, match=f"`--workdir`: `{url}` is a URL"):
        parse_command_line([f"--config={path}", f"--workdir={url}"], usage="")


def test_a_command_may_have_no_workdir(path):
    words = [f"--config={path}"]
    config, workdir, _ = parse_command_line(words, usage="", needs_workdir=False)
    assert (config.seed, workdir) == (0, None)
    with pytest.raises(ValueError, match="`--workdir`"):
        parse_command_line([*words, "--workdir=w"], usage="", needs_workdir=False)


def test_what_is_true_or_false_may_stand_alone():
    def read(*words):
        return parse_command_line(
            ["--workdir=w", *words], usage="", needs_config=False, verbose=False, quiet=True
        )[2]

    assert read() == {"verbose": False, "quiet": True}
    assert read("--verbose", "--quiet=false") == {"verbose": True, "quiet": False}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["`--config`", "required"]),
        (["--config=PATH"], ["`--workdir`", "required"]),
        (["--config=PATH", "--workdir=w"], ["`--out`", "required"]),
        (["--config=PATH", "--workdir="], ["`--workdir`", "required"]),
        (["--wrkdir=w"], ["`--wrkdir`", "`workdir`"]),
        (["--workdir=w", "--workdir=v"], ["`--workdir`", "twice"]),
        (["--config=PATH", "--workdir=w", "--out=o", "--policy=x"], ["`--policy`", "model", "`x`"]),
        (["--config=PATH", "--workdir=w", "--out=o", "--tasks=x"], ["`--tasks`", "int", "`x`"]),
        (["--workdir"], ["`--workdir`", "needs a value"]),
        (["train"], ["`train`"]),
    ],
)
def test_bad_command_lines_name_the_flag(path, words, expected):
    words = [word.replace("PATH", path) for word in words]
    with pytest.raises(ValueError, match="`") as error:
        parse_command_line(words, usage="", policy=("model", "expert"), tasks=400, out=str)
    assert [word for word in expected if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_help_lists_flags_and_the_fields_of_the_config(path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_command_line(
            ["--help", f"--config={path}", "--config.seed=5"], usage="Trains.", policy=("a", "b")
        )
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for word in ["Trains.", "--workdir", "--policy=a|b", "--config.seed=5", "train.learning_rate"]:
        assert word in shown


def test_help_says_what_may_be_left_out_and_what_stands_alone(capsys):
    with pytest.raises(SystemExit):
        parse_command_line(["--help"], usage="", or_stored=True, json=False, compile=True, out=str)
    lines = [line.split("  ")[1:] for line in capsys.readouterr().out.splitlines() if "--" in line]
    assert lines[:5] == [
        ["--config=NAME[:arg]", "(default: the workdir's)"],
        ["--workdir=DIR", "(required)"],
        ["--json", "(default False)"],
        ["--compile=false", "(default True)"],
        ["--out=OUT", "(required)"],
    ]


SHIPPED = ("quickstart", "household_pair:runlocal", "alfworld_qwen3", "searchqa_qwen3:runlocal")


@pytest.mark.parametrize("name", [*SHIPPED, "scienceworld_qwen3", "searchqa_qwen3"])
def test_each_field_that_help_shows_can_be_given_back_to_a_shell(name, capsys):
    with pytest.raises(SystemExit):
        parse_command_line(["--help", f"--config={name}"], usage="")
    lines = [line for line in capsys.readouterr().out.splitlines() if "--config." in line][1:]
    assert len(lines) > 50
    words = shlex.split("\n".join(lines))
    assert len(words) == len(lines)
    expected = flatten(load(name, []))
    given = {word[len("--config.") :].partition("=")[0] for word in words}
    assert expected.keys() - given <= {"compare.variants", "demonstrations.habits"}
    assert flatten(load(name, words)) == expected
    for word in words:  # and alone
        assert flatten(load(name, [word])) == expected


@pytest.mark.parametrize(
    "value",
    [
        *((), ("a",), ("a", "b c"), ("a,b", "c"), ("it's", '"'), ("", "x"), ("1", "2"), (" a",)),
        *((1, 2), (0.1, 1e-9), (True, False), "a, b", "", 3, 1e-5, None, False),
    ],
)
def test_what_is_written_is_read_as_the_same_value(value, tmp_path):
    config = tmp_path / "any.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config(arg=None):\n    return ConfigDict({{'x': {value!r}}})\n"
    )
    assert load(str(config), [f"--config.x={written(value)}"]).x == value
    # As Python writes it, too.
    assert load(str(config), [f"--config.x={value}"]).x == value


def test_what_no_text_means_is_not_written():
    assert [written(value) for value in ({}, (1, "a"), ((1,), (2,)))] == [None] * 3
