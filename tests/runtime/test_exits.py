"""The table of exit statuses, and the line that says why."""

import errno
import os
import re
from pathlib import Path

import pytest
from conftest import Start

from opd_jax import hf
from opd_jax.runtime.exits import DISK, MISTAKE, WORLD, WorldFailed, explain, reading, reported
from opd_jax.runtime.files import read_json


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


# As if the library was installed.
HttpError = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/proc/self/none/file")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("`a`: expected 1, got 2"), MISTAKE, "`a`: expected 1, got 2"),
        (WorldFailed("status 500 No space left on device"), WORLD, "status 500"),
        (WorldFailed("the server is away"), WORLD, "the server is away; the same command goes on"),
        (FULL, DISK, "No space left on device.* bytes are free in `/proc/self`"),
        (caused_by(RuntimeError("a thread failed"), FULL), DISK, "No space left on device"),
        # As the storage layer of checkpoints says it.
        (
            ValueError(
                'Error writing "/proc/self/none/state": No space left on device [OS error 28]'
            ),
            DISK,
            "bytes are free in `/proc/self`",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "x/below"),
            MISTAKE,
            "a path cannot be used: .*x/below",
        ),
        (FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), "x"), MISTAKE, "give another"),
        (OSError(errno.EIO, os.strerror(errno.EIO), "x"), DISK, "cannot be written"),
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE), "x"), WORLD, "a file system is away"),
        (TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), "x"), WORLD, "is away"),
        (
            caused_by(ValueError("wrong"), OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))),
            WORLD,
            "a file system is away: .*not connected",
        ),
        (ValueError("UNAVAILABLE: CURL error"), WORLD, "a bucket cannot be reached now: UNAVAIL"),
        (caused_by(ValueError("not saved"), HttpError("503")), WORLD, "reached now: 503"),
        (PermissionError(errno.EACCES, "Permission denied", "/proc/x"), DISK, "cannot be written"),
    ],
)
def test_an_error_that_is_no_bug_has_a_status_and_a_line(
    error: Exception, status: int, said: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended, reported():
        raise error
    assert ended.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(said, line)


@pytest.mark.parametrize(
    "error",
    [
        TypeError("wrong"),
        KeyError("absent"),
        RuntimeError("UNAVAILABLE: of a device"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"),
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "x"),
    ],
)
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    assert explain(error) is None
    with pytest.raises(type(error)), reported():
        raise error


def test_an_error_that_was_replaced_is_not_the_reason() -> None:
    def refuse() -> None:
        try:
            raise FULL
        except OSError:
            raise ValueError("`a` is wrong") from None

    with pytest.raises(ValueError, match="is wrong") as error:
        refuse()
    assert explain(error.value) == ("`a` is wrong", MISTAKE)


# A file that Linux refuses to read at its start, with EIO.
UNREADABLE = Path("/proc/self/mem")


@pytest.mark.skipif(not UNREADABLE.exists(), reason="a file of Linux")
def test_a_file_that_cannot_be_read_now_says_nothing_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(UNREADABLE)
    for read in (read_json, lambda path: hf.fingerprint(path.parent)):
        with pytest.raises(WorldFailed, match=r"cannot be read now: .*Input/output error"):
            read(tmp_path / "config.json")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_json(tmp_path / "absent.json")


def test_a_library_names_the_systems_error_in_its_text_only() -> None:
    words = os.strerror(errno.ESTALE)
    with pytest.raises(WorldFailed, match="`x` cannot be read now"), reading(Path("x")):
        raise RuntimeError(f'Error reading "x": {words} [OS error 116]')
    with pytest.raises(KeyError), reading(Path("x")):
        raise KeyError("absent")


def test_a_message_of_several_lines_becomes_one(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit), reported():
        raise ValueError("first\n  second")
    assert capsys.readouterr().err == "error: first second\n"


def test_a_path_that_the_locale_cannot_print_ends_nothing(start: Start) -> None:
    code = "from opd_jax.runtime import exits, processes\nwith exits.reported(): "
    with start("-c", code + "processes.say('runs/grün…')", PYTHONIOENCODING="ascii") as printing:
        assert printing.communicate(timeout=60) == ("runs/gr\\xfcn\\u2026\n", "")
    assert printing.returncode == 0
