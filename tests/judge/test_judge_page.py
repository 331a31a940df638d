"""The examples of docs/judge.md."""

import ast
import random
import re
import sys
from functools import partial
from pathlib import Path

import pytest
from test_others import PLAYED

from opd_jax.config import build, load
from opd_jax.config.settings import read_settings
from opd_jax.envs.household.env import Household
from opd_jax.envs.react import Random
from opd_jax.experience.demonstrations import play_out
from opd_jax.judge.prompt import NAMED, read_prompt
from opd_jax.losses import Verdict
from opd_jax.report.episodes import episode, write_episodes

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


def test_the_rule_is_compared_with_the_labels_of_an_episode_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)
    env = Household(size="medium", max_turns=20, show_admissible=0)
    tell = partial(episode, who="random", update=0, actor="student", decode=str)
    played = [
        play_out(env, "dev", n, player=lambda task, first, rng: Random(rng), rng=random.Random(n))
        for n in range(20)
    ]
    path = tmp_path / "episodes.jsonl"
    write_episodes(path, [tell(c) for c in played])
    monkeypatch.setattr(sys, "argv", ["agree.py", str(path)])
    exec(compile(code, "agree.py", "exec"), {})
    counts = dict(map(ast.literal_eval, capsys.readouterr().out.splitlines()))
    # The random player's commands are all possible, and most help nobody.
    assert sum(counts.values()) == sum(len(c.turns) for c in played)
    assert counts["STRONG", "STRONG"] > 200
    assert counts["STRONG", "STRONG"] > 20 * counts.get(("STRONG", "SKIP"), 0)


def test_the_question_is_read(tmp_path: Path) -> None:
    [text] = re.findall(r"```\n(good = .*?)```", PAGE, re.DOTALL)
    (tmp_path / "judge.txt").write_text(text)
    prompt = read_prompt(str(tmp_path / "judge.txt"))
    assert prompt.words == ("good", "unclear", "bad")
    assert prompt.text.endswith("Answer with one word.")
    fields = PAGE.partition("The fields are")[2].partition("A brace")[0]
    assert tuple(re.findall(r"`([\w.]+)`", fields)) == NAMED
