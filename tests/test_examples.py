"""The programs in docs/examples, run as their first lines say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
LOOPS = ("plain_jax", "flax_nnx", "with_equinox")


def run(name: str) -> str:
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    words = [sys.executable, ROOT / "docs" / "examples" / f"{name}.py"]
    return subprocess.run(words, env=environment, text=True, capture_output=True, check=True).stdout


def test_these_are_all_examples_and_each_is_short() -> None:
    found = {path.stem: path for path in (ROOT / "docs" / "examples").glob("*.py")}
    assert found.keys() == {*LOOPS, "open_export", "own_model", "sharded_vocabulary"}
    assert {name for name, path in found.items() if path.read_text().count("\n") >= 60} == set()


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_ones_own_learns(name: str) -> None:
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", run(name))]
    assert len(losses) == 4
    assert losses[-1] < losses[0] / 3


def test_a_student_of_ones_own_architecture_learns_on_policy() -> None:
    out = run("own_model")
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", out)]
    errors = [float(error) for error in re.findall(r"logprob_error (\S+)", out)]
    assert len(losses) == len(errors) == 24
    assert np.mean(losses[-4:]) < 0.75 * np.mean(losses[:4])
    # What `append` sampled, token by token, is what `hidden` makes of the whole row.
    assert 0 < max(errors) < 1e-5


def test_a_split_vocabulary_changes_nothing() -> None:
    whole, parts, differs = re.fullmatch(
        r"loss (\S+) on one device, (\S+) on 8\nlargest difference of the gradients (\S+)\n",
        run("sharded_vocabulary"),
    ).groups()
    assert abs(float(whole) - float(parts)) < 1e-5
    assert float(differs) < 1e-6
