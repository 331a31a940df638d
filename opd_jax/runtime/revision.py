"""Which code computes here, with which jax, on which processor: what a stored result is made by."""

import hashlib
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import jax

PACKAGE = Path(__file__).parents[1]


def revision() -> dict[str, Any]:
    """What results of this process are made by. Ask when it starts: files may change later.

    Returns:
      commit, uncommitted: the commit that git has checked out, and whether the package or the
        configs differ from it. "" and None where git does not know this package: it is installed
        from a wheel, or there is no git.
      sources: a hash of the package's and the configs' Python files. So two states of the code are
        told apart without git as well, and so are uncommitted changes.
      jax: its version.
      processor: the accelerator's kind, or the name of the CPU.
    """
    commit, uncommitted = _git(PACKAGE.parent)
    return {
        "commit": commit,
        "uncommitted": uncommitted,
        "sources": _hash_of_sources(),
        "jax": jax.__version__,
        "processor": _processor(),
    }


def _git(folder: Path) -> tuple[str, bool | None]:
    """The commit of a checkout and whether its code has changed since; ("", None) outside one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        # A wheel may be installed below somebody else's checkout.
        top, commit = git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != folder.resolve():
            return "", None
        return commit, bool(git("status", "--porcelain", "--", "opd_jax", "configs").strip())
    except (OSError, subprocess.CalledProcessError):
        return "", None


def _hash_of_sources() -> str:
    found = hashlib.sha256()
    # Configs lie in the package or, in a checkout, beside it.
    for root, pattern in ((PACKAGE, "**/*.py"), (PACKAGE.parent, "configs/*.py")):
        for path in sorted(root.glob(pattern)):
            found.update(f"{path.relative_to(root).as_posix()}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _processor() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        names = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = None
    return names[1] if names else platform.processor() or platform.machine()
