"""Every program compiled in a process of its own, one after another, and remembered.

JAX's own compilation cache cannot read again what was compiled for another platform, so what is
remembered is what was found out, under a hash of the lowered program and of all versions.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

from opd_jax.plan.analysis import Analysis
from opd_jax.plan.chips import LOCAL, Slice
from opd_jax.plan.program import Program

# For the TPU compiler to start where there is no TPU, beside others of its kind.
_TPU_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def has_compiler(where: Slice) -> bool:
    """Whether programs can be compiled for a slice on this machine."""
    return where.name == LOCAL or util.find_spec("libtpu") is not None


def default_cache() -> Path:
    """Where results are remembered: the user's cache directory."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "opd_jax" / "plan"


def compile_program(
    analysis: Analysis, program: Program, words: Sequence[str], *, cache: Path, limit_s: float
) -> dict[str, Any]:
    """What `compile_one` found out, now or before.

    Args:
      words: of the command line: the config and its overrides.
      cache: directory of remembered results.
      limit_s: after so many seconds the compiler is given up; this is not remembered.
    """
    path = cache / f"{_key(analysis, program)}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8")) | {"remembered": True}
    result = _compile(analysis, program, words, limit_s=limit_s)
    if not result.pop("failed", False):
        cache.mkdir(parents=True, exist_ok=True)
        # Renamed when whole: others may read it at the same time.
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(result), encoding="utf-8")
        partial.replace(path)
    return result | {"remembered": False}


def _key(analysis: Analysis, program: Program) -> str:
    """A hash of everything that the result depends on."""
    chip, run = analysis.slice.chip, analysis.run
    lowered = run.lower(program, platform=chip.platform).as_text()
    versions = [_version(name) for name in ("jax", "jaxlib", "libtpu")]
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    parts = [lowered, analysis.slice.name, chip.name, *map(str, run.mesh.shape.items())]
    return hashlib.sha256("\n".join(parts + versions + flags).encode()).hexdigest()


def _version(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"no {name}"


def _compile(
    analysis: Analysis, program: Program, words: Sequence[str], *, limit_s: float
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "opd_jax.plan.compile_one", *words]
        command += [f"--topology={analysis.slice.name}", f"--program={program.name}"]
        try:
            done = subprocess.run(
                [*command, f"--out={out}"],
                env=os.environ | _environment(analysis),
                capture_output=True,
                text=True,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired:
            return {"refused": f"no answer from the compiler within {limit_s:g} s", "failed": True}
        if done.returncode == 0:
            return json.loads(out.read_text(encoding="utf-8"))
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    message = f"the compiler ended with status {done.returncode}: {last}"
    return {"refused": message, "failed": True}


def _environment(analysis: Analysis) -> dict[str, str]:
    if analysis.slice.chip.platform == "tpu" and analysis.slice.name != LOCAL:
        return _TPU_ENVIRONMENT
    if analysis.slice.chip.platform == "cpu":
        return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(analysis.slice.chips)}
    # This process holds the device too.
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
