"""Paths that a user gives, and JSON and text files: read with an error, replaced as a whole."""

import contextlib
import errno
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from opd_jax.runtime.exits import reading


def local_path(text: str | Path, *, name: str) -> Path:
    """A path that a user gives, with a leading `~` replaced by the home directory.

    Args:
      text: the path.
      name: the flag or field that gives it, for the error.

    Raises:
      ValueError: it is a URL, such as gs://bucket/run, or names a home that does not exist.
    """
    # Two letters or more: a path of Windows begins with one. `Path` makes one slash of two.
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(text)):
        raise ValueError(
            f"`{name}`: `{text}` is a URL; expected a folder: mount what `{scheme[1]}` holds, and "
            "give a path below the mount"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"`{name}`: `{text}`: {error}; write the path out") from None


def check_subfolder(folder: Path) -> None:
    """Checks that a folder can be written, if there is one: a run finds out hours later.

    Raises:
      ValueError: it is a file or a link to nothing, or cannot be written.
    """
    if folder.is_symlink() and not folder.exists():
        raise ValueError(
            f"`{folder}` is a link to `{folder.readlink()}`, which is not there; mount or create "
            "what it names, or choose another --workdir"
        )
    other = "; move it away, or choose another --workdir"
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"`{folder}` is not a folder{other}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
            raise
        code = errno.errorcode[error.errno]
        raise ValueError(f"`{folder}` cannot be written ({code}){other}") from None


def read_json(
    path: Path, *, advice: str = "move it away, or choose another --workdir"
) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: the file does not hold one. The message names it and ends with `advice`.
      WorldFailed: it cannot be read now.
    """
    try:
        with reading(path):
            content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`{path}` must hold a JSON object: {error}; {advice}") from None
    if not isinstance(content, dict):
        got = type(content).__name__
        raise ValueError(f"`{path}` must hold a JSON object, got {got}; {advice}")
    return content


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that a kill or a crash leaves the old content or the new one."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """As `replace_text`."""
    # Processes that write the same file at the same time must not share a temporary one.
    temporary = path.with_name(f"{os.getpid()}.{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_temporaries(folder: Path) -> None:
    """Removes what `replace_text` left where it was killed. Nobody else may be writing there."""
    for path in folder.glob("*.tmp"):
        if re.fullmatch(r"\d+\..+\.tmp", path.name):
            path.unlink(missing_ok=True)
