"""The examples of docs/judge.md."""

import re
import sys
from pathlib import Path

import pytest
from test_others import PLAYED

from opd_jax.config import build, load
from opd_jax.config.settings import read_settings
from opd_jax.judge.prompt import NAMED, read_prompt
from opd_jax.losses import Verdict

PAGE = (Path(__file__).parents[2] / "docs" / "judge.md").read_text("utf-8")


def test_the_function_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "a_judge_of_ones_own.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--config.judge.by=a_judge_of_ones_own:repeats", "--config.env.max_turns=4"]
    settings = read_settings(load("quickstart", flags))
    verdict = build.make_labeller(settings, None)(PLAYED, 0).verdict
    assert verdict[0].tolist() == [Verdict.SKIP, Verdict.DET_FAIL, Verdict.STRONG, Verdict.SKIP]
    sys.modules.pop("a_judge_of_ones_own")


def test_the_question_is_read(tmp_path: Path) -> None:
    [text] = re.findall(r"```\n(good = .*?)```", PAGE, re.DOTALL)
    (tmp_path / "judge.txt").write_text(text)
    prompt = read_prompt(str(tmp_path / "judge.txt"))
    assert prompt.words == ("good", "unclear", "bad")
    assert prompt.text.endswith("Answer with one word.")
    fields = PAGE.partition("The fields are")[2].partition("A brace")[0]
    assert tuple(re.findall(r"`([\w.]+)`", fields)) == NAMED
