"""What the README shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from opd_jax import config as cfg

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_loss_example_prints_what_it_says():
    code, output = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.DOTALL).groups()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == output


def test_the_loss_example_uses_only_the_loss():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    imported = set(re.findall(r"(?:from|import) (opd_jax[\w.]*)", code))
    assert imported == {"opd_jax.losses"}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"--config=(\S+?\.py\S*)", README))))
def test_every_config_named_exists(name):
    cfg.validate(cfg.load(str(ROOT / name), []))


def test_every_file_of_the_layout_exists():
    layout = re.search(r"## Layout\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    names = re.findall(r"\b\w+\.py\b|\b\w+\.sh\b", layout)
    package = {p.name for p in [*(ROOT / "opd_jax").glob("*.py"), *(ROOT / "launch").glob("*.sh")]}
    assert set(names) <= package
    assert {p.name for p in (ROOT / "opd_jax").glob("*.py")} - set(names) == {"__init__.py"}


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README
