"""Compiled programs are kept between runs, and large ones are named before they are compiled."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from buckets import BUCKET, impatient, serving

from opd_jax.runtime import compilation

__all__ = ["impatient"]

PROGRAM = """
import sys
import jax
from opd_jax.runtime import compilation

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
compilation.start(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x @ x)(jax.numpy.ones((4, 4)))
print(hits.count("/jax/compilation_cache/cache_hits"), jax.config.jax_compilation_cache_dir)
"""


def run(folder: str, **variables: str) -> tuple[int, str]:
    """Programs that were loaded, and where they are kept."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, place = done.stdout.split()
    return int(loaded), place


def test_a_second_run_loads_what_the_first_compiled(tmp_path: Path) -> None:
    folder = str(tmp_path / "programs")
    assert run(folder) == (0, folder)
    loaded, _ = run(folder)
    assert loaded > 0
    # Switched off; and the variable that JAX knows comes first.
    assert run("") == (0, "None")
    assert run(folder, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own")) == (0, f"{tmp_path}/own")


def test_programs_are_kept_in_a_bucket_too() -> None:
    folder = f"gs://{BUCKET}/programs"
    with serving() as (storage, variables):
        assert run(folder, **variables) == (0, folder)
        assert storage.written
        assert all(name.startswith("programs/") for name in storage.written)
        loaded, _ = run(folder, **variables)
    assert loaded > 0


@pytest.fixture
def no_cache() -> Iterator[None]:
    """JAX keeps no programs yet."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_url_of_another_kind_is_no_folder(no_cache: None) -> None:
    with pytest.raises(ValueError, match="`program_cache`"):
        compilation.start("s3://bucket/programs")


def test_a_bucket_that_is_away_ends_no_run(
    no_cache: None,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://localhost:9")  # nobody listens
    compilation.start(f"gs://{BUCKET}/programs")
    assert jax.config.values["jax_compilation_cache_dir"] is None
    assert re.search(r"`program_cache`.* cannot be reached now: .*; this run keeps no", caplog.text)


def test_a_large_program_is_named_once_before_it_is_compiled(
    capsys: pytest.CaptureFixture[str],
) -> None:
    compilation.start("")
    compilation.start("")  # a second run of the same process

    @jax.jit
    def train_step(x: jax.Array) -> jax.Array:
        print("traced")
        return x * 3.0

    @jax.jit
    def small(x: jax.Array) -> jax.Array:
        return x + 5.0

    for size in (2, 2, 3):
        small(train_step(jnp.ones(size)))
    said = "traced\ncompiling the update (train_step)\n"
    assert capsys.readouterr().out == said * 2


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (4.0, ""),
        (6.0, "compiling judging took 6 s\n"),
        (130.0, 'compiling judging took 130 s ("Very slow compile?" is no error)\n'),
    ],
)
def test_a_long_compilation_says_how_long_it_took(
    seconds: float, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    compilation.start("")
    logging.getLogger("jax._src.interpreters.pxla").debug("Compiling jit(label_scores)")
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", seconds)
    assert capsys.readouterr().out == "compiling judging (label_scores)\n" + said


def test_nothing_else_that_jax_says_of_it_is_printed() -> None:
    code = "\n".join(
        [
            "import logging, jax",
            "from opd_jax.runtime import compilation",
            "logging.basicConfig()",  # as a library's import may do
            "compilation.start('')",
            "jax.jit(lambda x: x @ x)(jax.numpy.ones((4, 4)))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_programs_that_are_named_are_those_that_a_run_compiles() -> None:
    from opd_jax.agent import generate
    from opd_jax.judge import answer, reading

    named = [generate.sampling_params, generate.extend, generate.generate]
    named += [answer.label_scores, reading.extend_and_tell]
    assert {function.__name__ for function in named} < compilation.PROGRAMS.keys()
