"""What results are made by: the commit, whether the code differs, and a hash without git."""

import shutil
import subprocess
from pathlib import Path

import jax
import pytest

from opd_jax.runtime import revision


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *who, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "opd_jax").mkdir()
    (tmp_path / "opd_jax/a.py").write_text("a = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_a_checkout_names_its_commit_and_whether_code_has_changed(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert revision._git(checkout) == (commit, False)
    (checkout / "notes").touch()  # a result, say
    assert revision._git(checkout) == (commit, False)
    (checkout / "opd_jax/b.py").touch()
    assert revision._git(checkout) == (commit, True)


def test_a_package_inside_somebody_elses_checkout_has_no_commit(checkout: Path) -> None:
    inside = checkout / "venv/site-packages"
    inside.mkdir(parents=True)
    assert revision._git(inside) == ("", None)
    shutil.rmtree(checkout / ".git")
    assert revision._git(checkout) == ("", None)


def test_the_sources_tell_states_of_the_code_apart_without_git(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revision, "PACKAGE", checkout / "opd_jax")
    before = revision._hash_of_sources()
    (checkout / "opd_jax/a.py").write_text("a = 2\n")
    assert revision._hash_of_sources() != before
    (checkout / "opd_jax/a.py").write_text("a = 1\n")
    assert revision._hash_of_sources() == before
    # Configs beside the package are code too, and those of a wheel are the same ones.
    (checkout / "configs").mkdir()
    (checkout / "configs/c.py").write_text("c = 1\n")
    beside = revision._hash_of_sources()
    assert beside != before
    (checkout / "configs").rename(checkout / "opd_jax/configs")
    assert revision._hash_of_sources() == beside


def test_a_revision_names_jax_and_the_processor() -> None:
    found = revision.revision()
    assert found["jax"] == jax.__version__
    assert found["processor"]
