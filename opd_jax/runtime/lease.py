"""A lease on a folder: at most one run writes in it.

The lease is a file, ``lease.json``, that is created only if it is absent. It names its owner, and a
thread of the owner renews its heartbeat. Who finds a lease

- of a dead process of this machine, or of another machine with a heartbeat older than `EXPIRES_S`:
  takes it over;
- of a process of this machine that goes on living: is refused;
- of another machine: waits until it is given up or expires. A preempted machine cannot give its
  lease up, and whoever restarts the run elsewhere must not be refused for that.

A process that was paused so long that another took its lease ends as soon as it notices: two
writers would spoil the run. Machines may disagree about the time by less than `EXPIRES_S`; a lease
of another machine also expires if its heartbeat was not seen to change for so long.
"""

import contextlib
import dataclasses
import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_jax.runtime import processes
from opd_jax.runtime.exits import WORLD, print_error
from opd_jax.runtime.files import local_path, remove_temporaries, replace_text

FILE = "lease.json"
HEARTBEAT_S = 20.0
EXPIRES_S = 180.0
# How often somebody who waits looks again.
_LOOK_S = 1.0
# How long a process of this machine may take to die.
_PATIENCE_S = 2.0
# How long after taking a lease over its owner looks whether another did the same.
_SETTLE_S = 0.5


@dataclass(frozen=True)
class Owner:
    """A process, as other processes can find out whether it lives.

    Attributes:
      host: the machine's name.
      space: its boot, and the container's space of process numbers; "" where neither can be read.
      pid: the number of the process.
      start: when it started, in ticks since the boot; "" where that cannot be read.
    """

    host: str
    space: str
    pid: int
    start: str

    @classmethod
    def this_process(cls) -> "Owner":
        """The owner that this process would be."""
        space = ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            space = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        pid = os.getpid()
        return cls(socket.gethostname(), space, pid, _start_of(pid))

    def is_near(self) -> bool:
        """Whether this process can see whether the owner lives."""
        this = Owner.this_process()
        return (self.host, self.space) == (this.host, this.space)

    def is_alive(self) -> bool:
        """Whether it lives, for a near one. Another process may have its number by now."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it belongs to another user
            pass
        return _start_of(self.pid) == self.start


def _start_of(pid: int) -> str:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "dead" if fields[0] in "ZX" else fields[19]  # a zombie waits for its parent only


_UNKNOWN = Owner("", "unknown", 0, "")


@dataclass(frozen=True)
class _Lease:
    owner: Owner
    heartbeat: float

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def _read(path: Path) -> _Lease | None:
    """The lease in a file, None if there is none; of `_UNKNOWN` if it is not written to its end."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _Lease(Owner(**content["owner"]), float(content["heartbeat"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        with contextlib.suppress(FileNotFoundError):
            return _Lease(_UNKNOWN, path.stat().st_mtime)
        return None


@contextlib.contextmanager
def held(folder: Path, *, name: str = "--workdir") -> Iterator[Path]:
    """Opens a folder to write in: expands its path, creates it if it is absent, and leases it.

    Of several processes, process 0 holds it; every process has to call this. At the end the lease
    is removed, and so is a folder that was created and is empty. What killed processes left of
    half-written files is removed at the beginning.

    Args:
      folder: the folder.
      name: the flag that names it, for errors.

    Raises:
      ValueError: it is a URL, there is a file in its place, it cannot be written, or a process of
        this machine works in it.
    """
    folder = local_path(folder, name=name)
    created: list[Path] = []
    path, ours = folder / FILE, Owner.this_process()
    seen: dict[str, Any] = {}
    while True:
        # In steps: the others would not wait in one exchange for minutes.
        answer = _claim(folder, ours, created, seen, name) if processes.is_first() else ""
        answer = processes.first(answer)
        if answer not in ("again", "wait"):
            break
        time.sleep(_LOOK_S if answer == "wait" else 0.0)
    if answer:
        _remove_empty(created)
        raise ValueError(answer)
    if not processes.is_first():
        yield folder
        return
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(path, ours, ended), daemon=True)
    renewing.start()
    try:
        remove_temporaries(folder)
        yield folder
    finally:
        ended.set()
        renewing.join()
        with contextlib.suppress(OSError):
            if (lease := _read(path)) and lease.owner == ours:
                path.unlink()
        _remove_empty(created)


def _claim(folder: Path, ours: Owner, created: list[Path], seen: dict[str, Any], name: str) -> str:
    """Tries to take the lease: "" if it is ours now, "again", "wait", or why it is refused."""
    try:
        _create(folder, created)
        _write_new(folder / FILE, ours)
    except FileExistsError as error:
        if Path(error.filename or "") != folder / FILE:
            return f"`{name}`: `{error.filename}` is not a folder; choose another `{name}`"
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        code = errno.errorcode.get(error.errno or 0, type(error).__name__)
        return f"`{name}`: `{folder}` cannot be made or written ({code}); choose another `{name}`"
    else:
        if "removed" not in seen:
            return ""
        # Two that found the same expired lease may both have removed it, one of them a new one.
        time.sleep(_SETTLE_S)
        lease = _read(folder / FILE)
        return "" if lease and lease.owner == ours else "again"
    return _look(folder, seen, name)


def _write_new(path: Path, ours: Owner) -> None:
    with path.open("x", encoding="utf-8") as file:
        try:
            file.write(_Lease(ours, time.time()).text())
            file.flush()
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _look(folder: Path, seen: dict[str, Any], name: str) -> str:
    """What to do about somebody's lease; removes one that has expired."""
    path = folder / FILE
    if (lease := _read(path)) is None:
        return "wait"
    owner, now = lease.owner, time.monotonic()
    if seen.get("lease") != lease:
        seen |= {"lease": lease, "at": now}
    age = max(time.time() - lease.heartbeat, now - seen["at"])
    near = owner.is_near()
    # A living owner of this machine may have been unable to write: its disk is full.
    if not owner.is_alive() if near else age > EXPIRES_S:
        if _read(path) == lease:  # nobody else was faster
            path.unlink(missing_ok=True)
            seen["removed"] = True
        return "again"
    who = f"process {owner.pid} on {owner.host}"
    if near:
        if owner.pid != os.getpid() and now - seen.setdefault("first", now) < _PATIENCE_S:
            return "wait"  # it may be dying
        return (
            f"`{name}`: {who} is working in `{folder}`; wait until it ends, stop it, or choose "
            f"another `{name}`"
        )
    if "told" not in seen and owner != _UNKNOWN:
        seen["told"] = True
        processes.say(
            f"`{folder}` is held by {who}: waiting until it ends, or shows no sign of life for "
            f"{EXPIRES_S:.0f} s"
        )
    return "wait"


def _create(folder: Path, created: list[Path]) -> None:
    """Creates a folder and its parents; appends what it creates, the innermost last."""
    for path in reversed([folder, *folder.parents]):
        if not path.is_dir():
            path.mkdir(exist_ok=True)  # another run may be faster
            created.append(path)


def _remove_empty(created: list[Path]) -> None:
    for path in reversed(created):
        with contextlib.suppress(OSError):  # it is not empty, or somebody uses it
            path.rmdir()


def _renew(path: Path, ours: Owner, ended: threading.Event) -> None:
    """Renews the heartbeat until `ended`; ends the process if the lease is another's."""
    while not ended.wait(HEARTBEAT_S):
        try:
            lease = _read(path)
            if lease and lease.owner not in (ours, _UNKNOWN):
                break
            replace_text(path, _Lease(ours, time.time()).text())
        except OSError:  # a full disk or a network that is away: the next time
            continue
    else:
        return
    print_error(
        f"the lease on `{path.parent}` was lost: this process was paused, and another works there "
        "now; start the same command again"
    )
    sys.stdout.flush()
    os._exit(WORLD)
