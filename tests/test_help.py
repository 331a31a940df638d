"""`--help` of every command: a screen, with examples that its own parser takes."""

import re
import shlex
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from opd_jax.config import parse_command_line
from opd_jax.config.settings import read_settings

ROOT = Path(__file__).parents[1]
NAMES = {path.stem for path in (ROOT / "opd_jax").glob("*.py")} | {
    path.parent.name for path in (ROOT / "opd_jax").glob("*/__main__.py")
}
MODULES = {name: ROOT / "opd_jax" / f"{name}.py" for name in sorted(NAMES)}
COMMANDS = [
    name
    for name, path in MODULES.items()
    if not path.exists() or "\ndef main(argv" in path.read_text("utf-8")
]


def main_of(name: str) -> Callable[[list[str]], None]:
    package = f"opd_jax.{name}"
    return import_module(package if MODULES[name].exists() else f"{package}.__main__").main


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture) -> Callable[[str], str]:
    def ask(name: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main_of(name)(["--help"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    return ask


def test_the_commands_are_found() -> None:
    assert {"train", "evaluate", "export", "plan", "bench", "report"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_fits_a_screen_and_has_examples(name: str, help_of: Callable) -> None:
    lines = help_of(name).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    examples = [line for line in lines if line.startswith(f"    python -m opd_jax.{name} ")]
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example)[3:]
        configs = [word for word in words if re.match(r"--config[.=]", word)]
        if configs:  # the fields that it names are there, and their values are taken
            if not configs[0].startswith("--config="):  # the workdir's own
                configs.insert(0, "--config=quickstart")
            config, *_ = parse_command_line(configs, usage="", needs_workdir=False)
            read_settings(config)
