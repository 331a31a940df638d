"""A whole run in a bucket: killed, resumed, evaluated, exported, looked at and learnt from."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from buckets import BUCKET, serving
from processes import run_python
from test_train import UPDATES, assert_ended_alike, lines_of

from opd_jax.config.references import EMBEDDED
from opd_jax.runtime import bucket

RUN, MODELS = f"gs://{BUCKET}/runs/a", f"gs://{BUCKET}/models"


def fetched(storage: Any, prefix: str, folder: Path) -> Path:
    """A copy of what is in the bucket, on this machine."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in storage.contents().items():
        if name.startswith(f"{prefix}/"):
            path = folder / name.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


@pytest.mark.slow
def test_a_run_in_a_bucket_ends_with_the_bits_of_one_on_a_disk(
    trained: Any,
    tmp_path: Path,
    start: Callable,
    command: Callable,
    is_finished: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving() as (storage, variables):
        variables |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        bucket._open.cache_clear()

        def run(name: str, *flags: object) -> str:
            done = command(name, *flags)
            assert done.returncode == 0, done.stderr
            return done.stdout

        run_python(
            "import shutil, sys\n"
            "from opd_jax.runtime import bucket\n"
            "folder = bucket.place(sys.argv[2], name='--out', is_new=True)\n"
            "shutil.copytree(sys.argv[1], folder)\n"
            "bucket.upload(folder)",
            *(EMBEDDED / "teacher", f"{MODELS}/teacher"),
        )
        flags = (*trained.flags, f"--config.teacher={MODELS}/teacher", f"--workdir={RUN}")

        process = start("-m", "opd_jax.train", *flags)
        saved = "runs/a/checkpoints/2/commit_success.txt"
        while saved not in storage.written and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        killed = fetched(storage, "runs/a", tmp_path / "killed")
        steps = [line["step"] for line in lines_of(killed)]
        assert steps[:2] == [1, 2]  # and what half a minute has brought

        refused = start("-m", "opd_jax.train", *flags, "--config.seed=9")
        assert f"`{RUN}` holds a run with another config" in refused.communicate()[1]
        assert "resuming after update 2" in run("train", *flags)
        workdir = fetched(storage, "runs/a", tmp_path / "run")
        assert [line["step"] for line in lines_of(workdir)] == list(range(1, UPDATES + 1))
        assert_ended_alike(workdir, trained.workdir)
        assert not (workdir / "lease.json").exists()
        assert is_finished(*flags)

        run("evaluate", f"--workdir={RUN}", "--step=2", "--episodes=1")
        run("export", f"--workdir={RUN}", f"--out={MODELS}/a")
        run("view", RUN)
        workdir = fetched(storage, "runs/a", tmp_path / "run")
        assert "step-2" in json.loads((workdir / "summary.json").read_text())["eval"]
        assert RUN in (workdir / "episodes.html").read_text()
        run("export", f"--workdir={trained.workdir}", f"--out={tmp_path / 'model'}")
        exported = fetched(storage, "models/a", tmp_path / "exported")
        for file in (tmp_path / "model").iterdir():
            assert (exported / file.name).read_bytes() == file.read_bytes(), file.name

        code = (
            "import sys\n"
            "from opd_jax.config.references import find_model, fingerprint\n"
            "print(*(fingerprint(find_model(name, field='student')) for name in sys.argv[1:]))"
        )
        names = (f"{MODELS}/a", tmp_path / "model", f"workdir:{RUN}", f"workdir:{trained.workdir}")
        one, other, run_there, run_here = run_python(code, *names).split()
        assert (one, run_there) == (other, run_here)
