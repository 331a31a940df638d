"""Workdirs and model folders in Google Cloud Storage: `gs://BUCKET/PATH` instead of a path.

Objects cannot be appended to. So a folder in a bucket has a mirror on this machine, in which a
command reads and writes as in any other folder. `place` makes it and fetches what is in the bucket;
`upload` writes the files that have changed as whole objects, and deletes those that are gone. Only
the bucket counts: a mirror ends with its process, or the next one removes it. Checkpoints and the
lease have no mirror. Whoever writes them asks for the URL (`url_of`) of the path that they would
have in it.

Google's own library is used: its requests can depend on an object's generation, by which one of two
runs gets a lease. fsspec and `etils.epath` cannot replace an object on that condition. The extra
`gcs` is imported when the first URL is seen. Credentials are found as all of Google's libraries
find them. `STORAGE_EMULATOR_HOST` names another server.
"""

import contextlib
import errno
import fcntl
import functools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_jax.runtime.exits import WorldFailed, name_in_print, print_line
from opd_jax.runtime.files import local_path, read_json, replace_text

UPLOAD_S = 30.0
# How long a request is repeated.
_PATIENCE_S = 60.0
SCHEME = "gs://"
# Of the folder of all mirrors of a process.
_PREFIX, _LOCK = "opd_jax-", ".lock"
# A mirror is without these, below it too. Nobody reads them there, and they may be large.
_LEFT_OUT = re.compile(
    r"(.*/)?((checkpoints|profile|report)/.*|lease\.json|.*\.(safetensors|html)|)"
)
_TEMPORARY = re.compile(r"\d+\..+\.tmp|\..+\.partial")

# Of each file that is the same in the bucket, how it was then. Two threads may upload.
_same: dict[Path, tuple[int, int]] = {}
_generations: dict[Path, int] = {}
_uploading = threading.RLock()
# Until when nobody else takes a folder over that this process holds, by the monotonic clock.
leased_until: dict[Path, float] = {}


class Away(WorldFailed):
    """The bucket gave no answer, or one that says to try again."""


# --- Paths ----------------------------------------------------------------------------------------


@functools.cache
def _mirrors() -> tuple[Path, Any, Any]:
    """The folder of all mirrors; it is removed when the second one is, at the process's end.

    The third is a lock that ends with the process. What a killed one left is unlocked, and removed.
    """
    made = tempfile.TemporaryDirectory(prefix=_PREFIX)
    folder = Path(made.name).resolve()
    for left in folder.parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), left.open("r+") as file:  # another user's, or locked
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent)
    lock = (folder / f"{_LOCK}.new").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    Path(lock.name).replace(folder / _LOCK)  # so that nobody finds it unlocked
    name_in_print(folder, SCHEME[:-1])
    return folder, made, lock


def url_of(path: Path) -> str:
    """The URL of a path in a mirror; "" for all others."""
    if not _mirrors.cache_info().currsize or not path.is_relative_to(_mirrors()[0]):
        return ""
    return SCHEME + path.relative_to(_mirrors()[0]).as_posix()


def place(text: str, *, name: str, is_new: bool = False) -> Path:
    """A path that a user gives: as `local_path`, or the mirror of a URL, with what is there.

    Args:
      text: the path or the URL of a folder or a file.
      name: the flag or field that gives it, for errors.
      is_new: it will be written, so nothing is fetched.

    Raises:
      ValueError: it is a URL of another kind, or the bucket cannot be had.
      Away: the bucket cannot be reached now.
    """
    if not text.startswith(SCHEME):
        return local_path(text, name=name)
    parts = text.removeprefix(SCHEME).rstrip("/").split("/")
    if len(parts) < 2 or {"", ".", ".."} & set(parts):
        raise ValueError(f"`{name}`: `{text}`: expected gs://BUCKET/PATH")
    path = _mirrors()[0].joinpath(*parts)
    with _reaching(url_of(path), name):
        _bucket(path)
    if not is_new:
        fetch(path, name=name)
    return path


def _bucket(path: Path) -> Any:
    return _open(path.relative_to(_mirrors()[0]).parts[0])


@functools.cache
def _open(bucket: str) -> Any:
    import fsspec.config
    import gcsfs  # noqa: F401 - as orbax will
    from google.cloud import storage

    # It would remember what orbax has seen, and neither arrays nor `remove` tell it what is new.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    # A bucket's name says all, so no project is needed.
    return storage.Client(project=None).get_bucket(bucket, retry=_again())


@functools.cache
def _again() -> Any:
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(_PATIENCE_S)


def _key(path: Path) -> str:
    """The name of an object in its bucket."""
    return "/".join(path.relative_to(_mirrors()[0]).parts[1:])


def _blob(path: Path) -> Any:
    return _bucket(path).blob(_key(path))


@contextlib.contextmanager
def _reaching(url: str, name: str = "") -> Iterator[None]:
    """Tells what cannot be had from what cannot be reached now.

    Raises:
      ValueError: there are no credentials, no permission or no such bucket.
      Away: it cannot be reached now.
    """
    where = f"`{name}`: `{url}`" if name else f"`{url}`"
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"{where} needs the extra gcs, which is not installed ({error.name}): "
            "pip install 'opd-jax[gcs]'"
        ) from None
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        text = " ".join(str(error).split())
        if "RefreshError" in kinds and _may_refresh_later(error):
            raise Away(f"{where} cannot be reached now: {text}") from error
        if kinds & {"DefaultCredentialsError", "RefreshError"}:
            advice = "log in with `gcloud auth application-default login`, or on a machine of the"
            raise ValueError(
                f"{where}: no credentials for Google Cloud ({text}); {advice} project give it a "
                "service account"
            ) from None
        if kinds & {"Forbidden", "Unauthorized"}:
            advice = "give the account the roles that docs/scaling.md names"
            raise ValueError(f"{where}: no permission ({text}); {advice}") from None
        if "NotFound" in kinds:
            advice = "create it, or correct the name"
            raise ValueError(f"{where}: there is no such bucket ({text}); {advice}") from None
        if kinds & {"GoogleAPIError", "GoogleAuthError", "RequestException"}:
            raise Away(f"{where} cannot be reached now: {text}") from error
        raise


def _may_refresh_later(error: Any) -> bool:
    """Whether a RefreshError says only that whoever gives tokens is away.

    A machine's metadata server that answers with a status of 4xx is there, and gives none.
    """
    cause = error.__cause__
    if "TransportError" not in {kind.__name__ for kind in type(cause).__mro__}:
        return bool(error.retryable)
    return not any(400 <= getattr(part, "status", 0) < 500 for part in cause.args)


# --- Files ----------------------------------------------------------------------------------------


def fetch(path: Path, *, name: str = "") -> None:
    """Brings the mirror of a folder or a file up to date. Nothing to do for other paths.

    Args:
      path: of the folder or the file.
      name: as in `place`.

    Raises:
      ValueError, Away: as `place`.
    """
    if not (url := url_of(path)):
        return
    with _uploading, _reaching(url, name):
        single = _bucket(path).get_blob(_key(path), retry=_again())
        found = {path: single} if single else {path / name: b for name, b in _objects(path).items()}
        there = {file for file in found if not _LEFT_OUT.fullmatch(str(file.relative_to(path)))}
        for file in there:
            if _generations.get(file) != found[file].generation:
                file.parent.mkdir(parents=True, exist_ok=True)
                try:
                    found[file].download_to_filename(file, retry=_again())
                    _generations[file], _same[file] = found[file].generation, _state(file)
                except _conflicts():  # it was deleted or replaced meanwhile, and is not ours
                    file.unlink(missing_ok=True)
                    _forget(file)
        for file in _mirrored(path) - there:
            file.unlink(missing_ok=True)
            _forget(file)


def upload(path: Path) -> None:
    """Uploads what has changed in the mirror of a folder or a file; a model's config.json last.

    Nothing to do for other paths. In a run of several processes only the first one calls it.

    Raises:
      ValueError, Away: as `place`; Away too if the lease was not renewed in time.
    """
    if not (url := url_of(path)):
        return
    with _uploading, _reaching(url):
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        files = [file for file in files if not _TEMPORARY.fullmatch(file.name)]
        for file in sorted(files, key=lambda file: (file.name == "config.json", file)):
            with contextlib.suppress(FileNotFoundError), file.open("rb") as content:
                # Of the file that is open: its name may be another's by now.
                if _same.get(file) != (state := _state(content.fileno())):
                    _check_lease(file)
                    # A file that grows meanwhile is uploaded up to its size of now.
                    blob = _blob(file)
                    blob.upload_from_file(content, size=state[1], retry=_again())
                    _generations[file], _same[file] = blob.generation, state
        for file in _mirrored(path) - set(files):
            _check_lease(file)
            with contextlib.suppress(FileNotFoundError):
                Object(file).delete()
            _forget(file)


def _check_lease(file: Path) -> None:
    for folder in file.parents:
        if time.monotonic() > leased_until.get(folder, math.inf):
            raise Away(f"the lease on `{folder}` was not renewed in time, so nothing is uploaded")


def _mirrored(path: Path) -> set[Path]:
    """The files that are, or were, the same in the bucket."""
    return {file for file in _same if file.is_relative_to(path)}


def _state(file: Path | int) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_mtime_ns, found.st_size


def _forget(file: Path) -> None:
    _same.pop(file, None)
    _generations.pop(file, None)


@contextlib.contextmanager
def uploading(folder: Path) -> Iterator[None]:
    """Inside, what changes in a folder is uploaded every `UPLOAD_S` seconds, and at the end.

    Not at the end if it is the bucket that cannot be reached.
    """
    if not url_of(folder):
        yield
        return
    ended, is_away = threading.Event(), False

    def repeat() -> None:
        while not ended.wait(UPLOAD_S):
            # A checkpoint uploads too, and there it is an error.
            with contextlib.suppress(ValueError, Away):
                upload(folder)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    except Away:
        is_away = True
        raise
    finally:
        ended.set()
        if not is_away:
            thread.join()
            upload(folder)


# --- Objects --------------------------------------------------------------------------------------


def _objects(folder: Path) -> dict[str, Any]:
    """The objects below a folder, by their names relative to it."""
    start = f"{_key(folder)}/"
    found = _bucket(folder).list_blobs(prefix=start, retry=_again())
    return {blob.name.removeprefix(start): blob for blob in found}


def names(folder: Path) -> list[str]:
    """The names of all objects below a folder in a bucket, relative to it."""
    with _reaching(url_of(folder)):
        return list(_objects(folder))


def check_may_write(folder: Path) -> None:
    """Writes an object in a folder and deletes it. Nothing to do for other paths.

    Raises:
      ValueError, Away: as `place`.
    """
    if url_of(folder):
        probe = Object(folder / ".probe")
        probe.write("", generation=0)
        with contextlib.suppress(FileNotFoundError):
            probe.delete()


def remove(folder: Path) -> None:
    """Deletes all objects below a folder in a bucket."""
    for name in names(folder):
        with contextlib.suppress(FileNotFoundError):
            Object(folder / name).delete()


@dataclass(frozen=True)
class Object:
    """A text in a bucket that several machines write.

    Attributes:
      path: its place in a mirror; no file is there.
    """

    path: Path

    def read(self) -> tuple[str, int]:
        """The text and its generation; raises FileNotFoundError."""
        with _reaching(url_of(self.path)):
            while found := _bucket(self.path).get_blob(_key(self.path), retry=_again()):
                with contextlib.suppress(*_conflicts()):  # it was replaced meanwhile
                    text = found.download_as_text(
                        if_generation_match=found.generation, retry=_again()
                    )
                    return text, found.generation
        raise FileNotFoundError(self.path)

    def write(self, text: str, *, generation: int) -> None:
        """Writes it if that of `generation` is there, 0 for none; else raises FileExistsError.

        If an answer is lost, the client asks again, and is refused for what it has just written. So
        a conflict with the same text is none.
        """
        with _reaching(url_of(self.path)):
            try:
                _blob(self.path).upload_from_string(
                    text, if_generation_match=generation, retry=_again()
                )
            except _conflicts():
                with contextlib.suppress(FileNotFoundError):
                    if self.read()[0] == text:
                        return
                raise FileExistsError(errno.EEXIST, "replaced meanwhile", str(self.path)) from None

    def delete(self, *, generation: int | None = None) -> None:
        """Deletes it, or only one generation of it; raises FileNotFoundError."""
        with _reaching(url_of(self.path)):
            try:
                _blob(self.path).delete(if_generation_match=generation, retry=_again())
            except _conflicts():
                raise FileNotFoundError(self.path) from None


def _conflicts() -> tuple[type[Exception], ...]:
    from google.api_core.exceptions import NotFound, PreconditionFailed

    return NotFound, PreconditionFailed


# --- Models ---------------------------------------------------------------------------------------


@functools.cache  # once a process
def model_folder(url: str, *, name: str, wanted: Callable[[str], bool]) -> Path:
    """The files of a model in a bucket, fetched as a whole to ``~/.cache/opd_jax/models``.

    They stay there. What is replaced in the bucket is fetched again; its generation tells.

    Args:
      url: of the folder.
      name: the field that gives it, for errors.
      wanted: whether a file is needed, by its name.

    Raises:
      ValueError: nothing is there, or the bucket cannot be had.
      Away: the bucket cannot be reached now.
    """
    source, cache = place(url, name=name, is_new=True), _cache()
    folder = cache / source.relative_to(_mirrors()[0])
    name_in_print(cache, SCHEME[:-1])
    folder.mkdir(parents=True, exist_ok=True)
    with _reaching(url, name), (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes of this machine one fetches
        record = folder / ".fetched.json"
        known = {}
        with contextlib.suppress(ValueError):  # there is none, or it was cut off: all is fetched
            known = read_json(record)
        found = {part: blob for part, blob in _objects(source).items() if wanted(part)}
        if not found:
            raise ValueError(f"`{name}`: `{url}` holds no model; expected config.json and weights")
        for part in known.keys() - found.keys():
            (folder / part).unlink(missing_ok=True)
        known = {part: known[part] for part in known.keys() & found.keys()}
        for part, blob in found.items():
            file = folder / part
            is_whole = file.exists() and file.stat().st_size == blob.size
            if not is_whole or known.get(part) != blob.generation:
                print_line(f"fetching {file}, {blob.size / 1e9:.1f} GB", sys.stderr)
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_name(f".{file.name}.partial")
                # Checks the hash. Not `_again`: its minute would count from the file's first byte.
                blob.download_to_filename(partial)
                partial.replace(file)
                known[part] = blob.generation
                replace_text(record, json.dumps(known))
    return folder


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "opd_jax/models").resolve()
