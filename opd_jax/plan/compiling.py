"""Compiles programs, each in a process of its own, and remembers the results.

A compiler that hangs or dies takes nothing else with it. JAX's compilation cache cannot read what
was compiled for another platform. So the results are stored instead, under a hash of the lowered
program, our source and all versions.
"""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from opd_jax.plan.chips import LOCAL, Slice
from opd_jax.plan.collectives import collectives
from opd_jax.plan.hlo import parse
from opd_jax.plan.program import Program, Run
from opd_jax.plan.programs import plan_run
from opd_jax.runtime.files import replace_text

PACKAGE = Path(__file__).parents[1]
DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "opd_jax/plan")


def has_compiler(where: Slice) -> bool:
    """Whether this machine can compile programs for a slice."""
    tpu = where.chip.platform == "tpu" and util.find_spec("libtpu") is not None
    return where.name == LOCAL or tpu


def compile_programs(
    run: Run, *, cache: Path, limit_s: float
) -> Iterator[tuple[Program, dict[str, Any]]]:
    """Every program and what `compile_one` returned, the least likely to fit first.

    Args:
      cache: directory of remembered results.
      limit_s: seconds after which a compilation is given up. That is not remembered.
    """
    for program in sorted(run.programs, key=run.least, reverse=True):
        path = cache / f"{_key(run, program)}.json"
        if path.is_file():
            yield program, json.loads(path.read_text(encoding="utf-8"))
            continue
        print(f"compiling: {program.name}", file=sys.stderr, flush=True)
        result, answered = _in_process(run, program, limit_s)
        if answered:
            cache.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(result))
        yield program, result


def _key(run: Run, program: Program) -> str:
    """A hash of everything that the result depends on."""
    lowered = run.trace(program).lower(lowering_platforms=(run.where.chip.platform,)).as_text()
    # The lowered text has no places in our source, but the result names them.
    source = [path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))]
    names = ("jax", "jaxlib", "libtpu")
    packages = sorted((p.name, p.version) for p in metadata.distributions() if p.name in names)
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    parts = [lowered, str(run.where), str(run.mesh.shape), str(packages)]
    return hashlib.sha256("\n".join([*parts, *flags, *source]).encode()).hexdigest()


def _in_process(run: Run, program: Program, limit_s: float) -> tuple[dict[str, Any], bool]:
    """What the compiler said, and whether it came to an end."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "opd_jax.plan.compiling"],
            input=pickle.dumps((run.config, run.where, program.name)),
            env=os.environ | _environment(run.where),
            capture_output=True,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        return {"refused": f"no answer from the compiler within {limit_s:g} s"}, False
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]), True
    last = (done.stderr.decode(errors="replace").strip() or "no message").splitlines()[-1]
    return {"refused": f"the compiler ended with status {done.returncode}: {last}"}, False


def _environment(where: Slice) -> dict[str, str]:
    if where.name != LOCAL:
        # The TPU compiler starts on a machine without a TPU, and beside others of its kind.
        start = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1"}
        return {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **start}
    if where.chip.platform == "cpu":
        return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(where.chips)}
    # The process that waits holds the device too.
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def compile_one(config: FrozenConfigDict, where: Slice, name: str) -> dict[str, Any]:
    """What the compiler says of the program `name`.

    Returns:
      Why it `refused`, if it did. Else bytes on a device: `arguments`; `temporaries`, as if none
      shared memory; `code`; `peak`, most in use at any time; `total`, everything at once. And
      `collectives`, from `collectives.collectives`.
    """
    try:
        run = plan_run(config, where, devices=_devices(where))
        program = next(program for program in run.programs if program.name == name)
        compiled = run.trace(program).lower().compile()
    # A mesh that the slice has no wires for is a NotImplementedError.
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return {"refused": " ".join(str(error).split())}
    stats = compiled.memory_analysis()
    temporaries, code = stats.temp_size_in_bytes, stats.generated_code_size_in_bytes
    # Aliased outputs take the place of donated arguments.
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    total = stats.argument_size_in_bytes + new + temporaries + code
    return {
        "refused": "",
        "arguments": stats.argument_size_in_bytes,
        "temporaries": temporaries,
        "code": code,
        "peak": stats.peak_memory_in_bytes,
        "total": max(total, stats.peak_memory_in_bytes),
        "collectives": [part._asdict() for part in collectives(parse(compiled.as_text()))],
    }


def _devices(where: Slice) -> Sequence[jax.Device]:
    """The devices of a slice: those of this machine, or descriptions of TPUs."""
    if where.name == LOCAL:
        return jax.devices()
    from jax.experimental import topologies

    # A host with fewer chips than usual has to be described.
    bounds = {"chips_per_host_bounds": [1, 1, 1]} if where.chips == 1 else {}
    return topologies.get_topology_desc(where.name, platform="tpu", **bounds).devices


if __name__ == "__main__":
    # JAX would store a program for another platform and then fail to read it.
    jax.config.update("jax_enable_compilation_cache", False)
    print(json.dumps(compile_one(*pickle.load(sys.stdin.buffer))))
