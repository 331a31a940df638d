"""The table of exit statuses, and the line that says why."""

import errno
import os
import re

import pytest

from opd_jax.runtime.exits import DISK, MISTAKE, WORLD, WorldFailed, explain, reported


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


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


def test_a_message_of_several_lines_becomes_one(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit), reported():
        raise ValueError("first\n  second")
    assert capsys.readouterr().err == "error: first second\n"
