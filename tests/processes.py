"""Python in another process, which finds the package and the tests of the environments."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_python(code: str, *arguments: object, **environment: str) -> str:
    """Runs code to its end, which must be a success; returns what it printed."""
    path = os.pathsep.join(str(ROOT / name) for name in ("", "tests", "tests/envs"))
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
