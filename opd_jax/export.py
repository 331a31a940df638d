"""Writes the newest checkpoint of a workdir as a Hugging Face folder.

    python -m opd_jax.export --workdir=DIR --out=DIR

`transformers` opens the folder; `student` and `teacher` of a config may name it too. Adapters are
merged into the weights. No accelerator is used: the host reads the parameters, without the
optimizer's moments, and writes them file by file. Any number of devices may have trained them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from opd_jax import hf
from opd_jax.config import build, fail, parse_command_line, read_stored
from opd_jax.config.models import load_student, model_folder, new_sizes, student_sizes
from opd_jax.config.settings import Settings, read_settings
from opd_jax.model import ModelConfig, Params, is_spec, param_specs
from opd_jax.model.lora import lora_specs, with_adapters
from opd_jax.runtime.checkpoint import Checkpoints
from opd_jax.runtime.mesh import make_mesh


def export(workdir: Path, out: Path) -> int:
    """Exports the student of `workdir` to `out`; returns the number of its update.

    Raises:
      ValueError: no run or no checkpoint in `workdir`, or `out` is in use.
    """
    stored = workdir / "config.json"
    if not stored.is_file():
        raise ValueError(f"`--workdir`: `{workdir}` has no config.json; give a run's workdir")
    settings = read_settings(read_stored(stored))
    sizes = student_sizes(settings)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=settings.checkpoint.keep)
    restored = checkpoints.restore_latest({"params": _trained(settings, sizes)}, partial=True)
    if restored is None:
        raise ValueError(f"`--workdir`: `{workdir}` has no checkpoint yet; let the run save one")
    step, state, _ = restored
    frozen = None
    if settings.lora.rank:  # the student's own parameters, on the host
        host = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.local_devices(backend="cpu")[:1])
        frozen = load_student(settings, host).params
    params = with_adapters(frozen, state["params"], build.adapters(settings))
    new = settings.student == "new"
    tokenizer = new_sizes(settings)[1] if new else model_folder(settings.student)
    hf.save_model(out, params, sizes, dtype=jnp.dtype(settings.dtype), tokenizer_from=tokenizer)
    return step


def _trained(settings: Settings, sizes: ModelConfig) -> Params:
    """Shapes of what was trained, without shardings: it is read to the host."""
    lora = build.adapters(settings)
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(settings.dtype)),
        lora_specs(sizes, lora) if lora else param_specs(sizes),
        is_leaf=is_spec,
    )


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.export`."""
    # Otherwise JAX takes the memory of accelerators.
    jax.config.update("jax_platforms", "cpu")
    try:
        _, workdir, flags = parse_command_line(argv, usage=__doc__, needs_config=False, out=str)
        step = export(workdir, Path(flags["out"]))
        print(f"update {step} of {workdir} written to {flags['out']}")
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
