"""The built wheel, in an environment and a folder of its own, is enough."""

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
OWN_CONFIG = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
SMALL = ("train.updates=1", "rollout.batch=4", "eval.tasks=2", "eval.batch=2", "env.max_turns=3")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs the Python of a new environment, which has the wheel, in an empty folder.

    The packages that ours needs are those of this Python; our sources are not among them.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source, venv, empty = folder / "source", folder / "venv", folder / "empty"
    # A checkout: what is in no commit is not in the wheel.
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    new = venv / "bin" / "python"
    isolated = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*words: object) -> str:
        done = subprocess.run(
            [new, *map(str, words)], cwd=empty, env=isolated, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    empty.mkdir()
    wheels = folder / "wheels"
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, source]
    subprocess.run(build, check=True)
    [wheel] = wheels.glob("opd_jax-*.whl")
    run("-m", "pip", "install", "-q", "--no-deps", wheel)
    # Behind its own packages; a path file of ours that is there is not followed.
    site = Path(run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert run("-c", "import opd_jax; print(opd_jax.__file__)").startswith(str(site))
    return run


def test_the_quickstart_and_a_config_of_ones_own_train(python: Callable[..., str]) -> None:
    shrunk = [f"--config.{change}" for change in SMALL]
    words = ("--config=quickstart:runlocal", "--workdir=runs/quickstart")
    printed = python("-m", "opd_jax.train", *words, *shrunk)
    assert "| after " in printed
    python("-c", f"open('mine.py', 'w').write({OWN_CONFIG!r})")
    printed = python("-m", "opd_jax.train", "--config=mine.py", "--workdir=runs/mine", *shrunk)
    assert "| after " in printed
    printed = python("-m", "opd_jax.export", "--workdir=runs/mine", "--out=runs/mine/model")
    assert "written to" in printed
    words = ("household", "--size=small", "--show_admissible=0")
    assert "keeps the protocol" in python("-m", "opd_jax.envs.check", *words)
