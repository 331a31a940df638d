"""How commands end: one table of exit statuses.

Launchers start a run again after `WORLD`, as often as `launch` says without a new checkpoint. They
stop at every other status.
"""

import contextlib
import errno
import io
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

# 0 is done, or stopped by a signal with everything saved. 1 is a bug: Python's, with a traceback.
MISTAKE = 2  # the user's: in the command, the config or a folder
DISK = 74  # full, or cannot be written (EX_IOERR of sysexits.h)
WORLD = 75  # a server, an engine or another process failed (EX_TEMPFAIL)
INTERRUPTED = 130  # Ctrl-C before there was anything to save (128 + SIGINT)

_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
}
# A network file system, or the network below it, is away. Not all systems have all of them.
AWAY_ERRORS = {
    getattr(errno, name)
    for name in (
        *("ESTALE", "ETIMEDOUT", "ENOTCONN", "EREMOTEIO", "ENOLINK", "ECOMM"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET"),
    )
    if hasattr(errno, name)
}
# A file where a folder is needed, or a folder where a file is.
_PLACE_ERRORS = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP}
_PLACE_ERRORS.add(errno.ENAMETOOLONG)
# The terminal has hung up, or the reader of the pipe has ended.
_GONE = {errno.EIO, errno.EPIPE}
# Libraries that read and write files raise other types, with the system's words in their text.
_DISK_WORDS = re.compile(
    "|".join(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)))
)
# Of libraries that reach a bucket. tensorstore's errors are ValueErrors that begin with a word.
_BUCKET_MODULES = ("gcsfs", "aiohttp", "google.api_core", "google.auth", "google.cloud")
_BUCKET_WORDS = "UNAVAILABLE: |DEADLINE_EXCEEDED: "
_READING_WORDS = re.compile(
    "|".join([*map(os.strerror, sorted(AWAY_ERRORS | {errno.EIO})), _BUCKET_WORDS])
)


class Stopped(SystemExit):
    """A signal ended the command, and what was finished is saved; the status is 0."""

    def __init__(self) -> None:
        super().__init__(0)


class WorldFailed(RuntimeError):
    """Something outside the program failed: a server, an engine, another process.

    The same command resumes the run, so launchers start it again.
    """


# What to print in place of the beginning of a path: a mirror's place says nothing (`bucket`).
_printed_as: dict[str, str] = {}


def name_in_print(folder: Path, text: str) -> None:
    """From now on whatever is printed says `text` in place of a folder."""
    _printed_as[str(folder)] = text


def printed(text: str) -> str:
    """A text as it is printed, with the folders' names."""
    for folder, name in _printed_as.items():
        text = text.replace(folder, name)
    return text


def print_line(text: str, stream: TextIO) -> None:
    """Prints, unless nobody reads the stream any more: then what was computed matters more."""
    text = printed(text)
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if error.errno in _GONE:
            # What is left in its buffer would make Python's exit fail.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_error(message: str) -> None:
    """One line to stderr."""
    print_line("error: " + " ".join(message.split()), sys.stderr)


def end_at_ctrl_c() -> None:
    """Until `reported` begins there is nothing to undo: Ctrl-C ends the process, with one line."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)


def _interrupted(*_: object) -> None:
    print_error("interrupted")
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Runs a command. Errors that `explain` knows end it with one line, without a traceback."""
    if signal.getsignal(signal.SIGINT) == _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every locale has every character of a path
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except Exception as error:
        known = explain(error)
        if not known:
            raise
        message, status = known
        print_error(message)
        raise SystemExit(status) from None
    except KeyboardInterrupt:
        print_error("interrupted")
        raise SystemExit(INTERRUPTED) from None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Reads a file or a folder that a user names.

    Raises:
      WorldFailed: the disk or a network file system does not give it now (EIO, ESTALE, ...): that
        says nothing of what is in the file.
    """
    try:
        yield
    except Exception as error:
        if not _READING_WORDS.search(str(error)):
            raise
        raise WorldFailed(f"`{path}` cannot be read now: {error}") from error


def explain(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit status of an error; None for a bug."""
    if isinstance(error, WorldFailed):
        return f"{error}; the same command goes on from the last checkpoint", WORLD
    cause: BaseException | None = error
    while cause:
        if (isinstance(cause, OSError) and cause.errno in _DISK_ERRORS) or (
            not isinstance(cause, OSError) and _DISK_WORDS.search(str(cause))
        ):
            return _about_the_disk(cause), DISK
        if isinstance(cause, OSError) and cause.errno in AWAY_ERRORS:
            return explain(WorldFailed(f"a file system is away: {cause}"))
        if type(cause).__module__.startswith(_BUCKET_MODULES) or (
            isinstance(cause, ValueError) and re.match(_BUCKET_WORDS, str(cause))
        ):
            return explain(WorldFailed(f"a bucket cannot be reached now: {cause}"))
        shown = not cause.__suppress_context__
        cause = cause.__cause__ or (cause.__context__ if shown else None)
    if isinstance(error, ValueError):
        return str(error), MISTAKE
    if isinstance(error, OSError) and error.errno in _PLACE_ERRORS:
        return f"a path cannot be used: {error}; give another, or move away what is there", MISTAKE
    return None


def _about_the_disk(error: BaseException) -> str:
    text = " ".join(str(error).split())
    named = getattr(error, "filename", None) or next(
        iter(re.findall(r"[\"'`](/[^\"'`]+)", text)), ""
    )
    room = ""
    if named:
        # Not `Path.is_dir`: that raises below a folder that may not be read.
        folder = next(p for p in (Path(named), *Path(named).parents) if os.path.isdir(p))
        room = f"; {shutil.disk_usage(folder).free} bytes are free in `{folder}`"
    return (
        f"the disk is full or cannot be written: {text[:300]}{room}; what was saved before is "
        "whole: make room, and start the same command again"
    )
