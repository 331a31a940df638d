"""The code and the commands of docs/environment.md, in an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "environment.md").read_text("utf-8")
GUESS, CONFIG = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    shlex.split(line)[1:] for line in re.findall(r"^python -m .*[^\\]$", PAGE, re.MULTILINE)
]
SMALL = ("train.updates=2", "rollout.batch=4", "eval.tasks=4", "eval.batch=4", "checkpoint.every=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "guess.py").write_text(GUESS)
    (folder / "guess_config.py").write_text(CONFIG)
    return folder


@pytest.fixture
def run(folder: Path) -> Callable[..., str]:
    def run(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_environment_is_short_and_keeps_the_protocol(run: Callable[..., str]) -> None:
    code = [line for line in GUESS.splitlines() if line.strip()]
    assert len(code) <= 50
    [check] = [words for words in COMMANDS if words[1] == "opd_jax.envs.check"]
    printed = run(*check)
    assert "BREAKS" not in printed
    assert "it solves 8 of 8 tasks" in printed
    assert printed.endswith("`guess:Guess` keeps the protocol\n")


@pytest.mark.slow
def test_the_student_is_trained_by_the_page_s_commands(
    run: Callable[..., str], folder: Path
) -> None:
    shrunk = [f"--config.{change}" for change in SMALL]
    for words in COMMANDS:
        if words[1] == "opd_jax.export":
            run(*words)
        if words[1] == "opd_jax.train":
            run(*words, *shrunk)
    summary = json.loads((folder / "runs" / "guess" / "summary.json").read_text())
    assert summary["eval"].keys() == {"before", "teacher", "after"}
    rows = (folder / "runs" / "guess" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["batch/turns"] <= 4 for row in rows] == [True, True]
    # The environment's labels as verdicts, in workers, with the embedded pair.
    pair = ("student=embedded:student", "teacher=embedded:teacher")
    sage = (*pair, "judge.by=oracle", "weight.by=sage", "env.workers=true")
    words = ["-m", "opd_jax.train", "--config=guess_config.py", "--workdir=runs/sage"]
    run(*words, *shrunk, *(f"--config.{change}" for change in sage))
    row = json.loads((folder / "runs" / "sage" / "metrics.jsonl").read_text().splitlines()[0])
    verdicts = sum(row[f"verdict/{name}"] for name in ("skip", "weak", "strong", "det_fail"))
    assert verdicts == pytest.approx(1)
