"""A lease on a folder: at most one run writes in it.

The lease is a file, ``lease.json``, that is created only if it is absent. It names its owner, and a
thread of the owner renews its heartbeat. Who finds a lease

- of a dead process of this machine, or of another machine with a heartbeat older than `EXPIRES_S`,
  or that came with a copy of the folder: takes it over;
- of a process of this machine that goes on living: is refused;
- of another machine: waits until it is given up or expires. A preempted machine cannot give its
  lease up, and whoever restarts the run elsewhere must not be refused for that. Who has something
  else to do (`wait=False`) waits only until the heartbeat is renewed, and is refused then.

In a bucket the lease is an object, and its generation decides between two that write it.

A process that was paused so long that another took its lease ends as soon as it notices: two
writers would spoil the run. In a bucket, so does one that could not renew its heartbeat for
`EXPIRES_S`, and it uploads no more. Machines may disagree about the time by less than `EXPIRES_S`;
a lease of another machine also expires if its heartbeat was not seen to change for so long.
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
from dataclasses import dataclass, field
from pathlib import Path

from opd_jax.runtime import bucket, processes
from opd_jax.runtime.exits import AWAY_ERRORS, WORLD, WorldFailed, print_error
from opd_jax.runtime.files import local_path, remove_temporaries, replace_text

FILE = "lease.json"
LOCK = "lease.json.lock"  # of who takes an expired lease over, for a moment
HEARTBEAT_S = 20.0
EXPIRES_S = 180.0
# How often somebody who waits looks again.
_LOOK_S = 1.0
# How long a process of this machine may take to die.
_PATIENCE_S = 2.0


class Held(ValueError):
    """A living process works in the folder, and nobody waits for it."""


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
    folder: str = ""  # where the owner holds it
    generation: int = 0  # of the object in a bucket

    def text(self) -> str:
        content = dataclasses.asdict(self)
        del content["generation"]
        return json.dumps(content, indent=2) + "\n"


def _read(path: Path) -> _Lease | None:
    """The lease in a file, None if there is none; of `_UNKNOWN` if it is not written to its end."""
    in_bucket, generation = bool(bucket.url_of(path)), 0
    try:
        if in_bucket:
            text, generation = bucket.Object(path).read()
        else:
            text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        folder = str(content.get("folder", ""))
        return _Lease(Owner(**content["owner"]), float(content["heartbeat"]), folder, generation)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        if in_bucket and not generation:  # it could not be read
            raise
        if in_bucket:  # objects are whole, so it is no lease
            return _Lease(_UNKNOWN, 0.0, generation=generation)
        with contextlib.suppress(FileNotFoundError):
            return _Lease(_UNKNOWN, path.stat().st_mtime)
        return None


def _write(path: Path, ours: Owner, before: _Lease | None) -> None:
    """Puts our lease in the place of the one before; in a bucket only if that is still there."""
    if bucket.url_of(path):
        generation = before.generation if before else 0
        bucket.Object(path).write(_ours(path, ours).text(), generation=generation)
    else:
        replace_text(path, _ours(path, ours).text())


@contextlib.contextmanager
def held(folder: Path, *, name: str = "--workdir", wait: bool = True) -> Iterator[Path]:
    """Opens a folder to write in: expands its path, creates it if it is absent, and leases it.

    Of several processes, process 0 holds it; every process has to call this. At the end the lease
    is removed, and so is a folder that was created and is empty. What killed processes left of
    half-written files is removed at the beginning. The mirror of a folder in a bucket is brought up
    to date, and while it is held, process 0 uploads what changes in it.

    Args:
      folder: the folder.
      name: the flag that names it, for errors.
      wait: wait for a living process of another machine; if not, it is refused as one of this
        machine is.

    Raises:
      ValueError: it is a URL, there is a file in its place, or it cannot be written.
      Held: a process of this machine works in it; without `wait`, one of any machine.
    """
    folder = local_path(folder, name=name)
    claim = _Claim(folder, name, wait)
    path, ours = folder / FILE, claim.ours
    while True:
        asked = time.monotonic()
        # In steps: the others would not wait in one exchange for minutes.
        answer = processes.first(claim.step() if processes.is_first() else "")
        if answer not in ("again", "wait"):
            break
        time.sleep(_LOOK_S if answer == "wait" else 0.0)
    if answer:
        _remove_empty(claim.created)
        raise answer if isinstance(answer, Held) else ValueError(answer)
    if not processes.is_first():
        bucket.fetch(folder)
        yield folder
        return
    bucket.leased_until[folder] = asked + EXPIRES_S
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(path, ours, ended), daemon=True)
    renewing.start()
    try:
        remove_temporaries(folder)
        bucket.fetch(folder)
        with bucket.uploading(folder):
            yield folder
    finally:
        ended.set()
        renewing.join()
        bucket.leased_until.pop(folder, None)
        with contextlib.suppress(OSError, WorldFailed):
            if (lease := _read(path)) and lease.owner == ours:
                _remove(path, lease)
        _remove_empty(claim.created)


@dataclass
class _Claim:
    """One process's attempt to take the lease on a folder: who asks, and what it has seen so far.

    Attributes:
      folder, name, wait: as in `held`.
      created: the folders that did not exist, the innermost last.
      begun: when the attempt began, by the monotonic clock.
      seen, seen_at: somebody's lease, and when it was first seen as it is.
      told: whether the user knows that we wait.
    """

    folder: Path
    name: str
    wait: bool = True
    ours: Owner = field(default_factory=Owner.this_process)
    created: list[Path] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)
    seen: _Lease | None = None
    seen_at: float = 0.0
    told: bool = False

    def step(self) -> str | Held:
        """Tries to take the lease: "" if it is ours now, "again", "wait", or why it is refused."""
        path, other = self.folder / FILE, f"choose another `{self.name}`"
        try:
            _create(self.folder, self.created)
            _write_new(path, self.ours)
        except FileExistsError as error:
            if Path(error.filename or "") == path:
                return self._look(path, other)
            return f"`{self.name}`: `{error.filename}` is not a folder; {other}"
        except OSError as error:
            if error.errno == errno.ENOENT and Path(error.filename or "") == path:
                return "again"  # who held the folder has just removed it
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, *AWAY_ERRORS):
                raise
            code = errno.errorcode.get(error.errno or 0, type(error).__name__)
            return f"`{self.name}`: `{self.folder}` cannot be made or written ({code}); {other}"
        return ""

    def _look(self, path: Path, other: str) -> str | Held:
        """What to do about the lease that is there."""
        if (lease := _read(path)) is None:
            return "wait"
        owner, now = lease.owner, time.monotonic()
        renewed = self.seen is not None and lease != self.seen
        if lease != self.seen:
            self.seen, self.seen_at = lease, now
        age = max(time.time() - lease.heartbeat, now - self.seen_at)
        near = owner.is_near()
        # A living owner of this machine may have been unable to write: its disk is full.
        expired = not owner.is_alive() if near else age > EXPIRES_S
        if expired or (near and _is_copied(path, lease)):
            return _take_over(path, lease, self.ours)
        who = f"process {owner.pid} on {owner.host}"
        if near and owner.pid != os.getpid() and now - self.begun < _PATIENCE_S:
            return "wait"  # it may be dying
        if near or (renewed and not self.wait):
            return Held(
                f"`{self.name}`: {who} is working in `{self.folder}`; wait until it ends, stop it, "
                f"or {other}"
            )
        if not self.told and owner != _UNKNOWN:
            self.told = True
            sign = f"sign of life for {EXPIRES_S:.0f} s"
            until = f"until it ends, or shows no {sign}" if self.wait else f"for a {sign} at most"
            processes.say(f"`{self.folder}` is held by {who}: waiting {until}")
        return "wait"


def _remove(path: Path, lease: _Lease) -> None:
    if bucket.url_of(path):
        bucket.Object(path).delete(generation=lease.generation)
    else:
        path.unlink()


def _is_copied(path: Path, lease: _Lease) -> bool:
    """Whether the owner holds the folder of which this one is a copy."""
    if url := bucket.url_of(path.parent):
        return lease.folder not in ("", url)
    held_at = Path(lease.folder) / FILE
    if not lease.folder or held_at == path.resolve():
        return False
    with contextlib.suppress(OSError):
        if (original := _read(held_at)) and original.owner == lease.owner:
            return not held_at.samefile(path)
    return False


def _take_over(path: Path, expired: _Lease, ours: Owner) -> str:
    """Replaces an expired lease by ours: "", "again" or "wait", as `_Claim.step`.

    Several processes may have found it. The one that creates a lock looks once more, and replaces
    the file without a moment in which there is none.
    """
    if expired.generation:
        try:
            _write(path, ours, expired)
        except FileExistsError:
            return "again"
        return ""
    lock = path.with_name(LOCK)
    try:
        lock.touch(exist_ok=False)
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime > EXPIRES_S:  # its owner was killed right there
                lock.unlink()
        return "wait"
    try:
        if _read(path) != expired:
            return "again"
        _write(path, ours, expired)
        return ""
    finally:
        lock.unlink(missing_ok=True)


def _ours(path: Path, ours: Owner) -> _Lease:
    folder = bucket.url_of(path.parent) or str(path.parent.resolve())
    return _Lease(ours, time.time(), folder)


def _write_new(path: Path, ours: Owner) -> None:
    if bucket.url_of(path):
        _write(path, ours, None)
        return
    with path.open("x", encoding="utf-8") as file:
        try:
            file.write(_ours(path, ours).text())
            file.flush()
        except OSError:
            path.unlink(missing_ok=True)
            raise


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
    """Renews the heartbeat until `ended`; ends the process if the lease is not ours any more."""
    wait_s = HEARTBEAT_S
    while not ended.wait(wait_s):
        wait_s, now = HEARTBEAT_S, time.monotonic()
        try:
            lease = _read(path)
            # None: another took it, ended and gave it up.
            if lease is None or lease.owner not in (ours, _UNKNOWN):
                break
            _write(path, ours, lease)
            bucket.leased_until[path.parent] = now + EXPIRES_S
        except FileExistsError:  # somebody else wrote it just now
            wait_s = 0.0
        # A full disk, a network that is away, a bucket that refuses for now: the next time. On a
        # disk the lease of a living owner does not expire.
        except (OSError, WorldFailed, ValueError):
            if bucket.url_of(path) and time.monotonic() > bucket.leased_until[path.parent]:
                break
    else:
        return
    print_error(
        f"the lease on `{path.parent}` was lost: this process was paused or the bucket was away, "
        "and another may work there; start the same command again"
    )
    sys.stdout.flush()
    os._exit(WORLD)
