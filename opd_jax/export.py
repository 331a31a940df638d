"""Writes a checkpoint of a workdir as a Hugging Face folder: the newest, or that of `--step`.

    python -m opd_jax.export --workdir=runs/quickstart --out=runs/quickstart/model
    python -m opd_jax.export --workdir=runs/quickstart --out=model --step=120 --dtype=bfloat16

`transformers` 4.51 and later open the folder; `student` and `teacher` of a config may name it too.
It has the dtype of the student's folder, or `--dtype`, and that folder's other files; a folder that
was moved is given as `--student=DIR`. Adapters are merged into the weights. No accelerator is used:
the host reads the parameters, without the optimizer's moments, and writes them file by file. Any
number of devices may have trained them.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from opd_jax import hf
from opd_jax.config import build, parse_command_line, read_stored
from opd_jax.config.models import load_found, student_dtype
from opd_jax.config.references import FoundModel, find_step, find_student, model_folder
from opd_jax.config.settings import Settings, read_settings
from opd_jax.config.stored import closest_run
from opd_jax.config.workdir import check_models
from opd_jax.model import ModelConfig, Params, is_spec, param_specs
from opd_jax.model.lora import lora_specs, with_adapters
from opd_jax.runtime import bucket
from opd_jax.runtime.checkpoint import Checkpoints
from opd_jax.runtime.exits import print_line, reported
from opd_jax.runtime.mesh import make_mesh


def export(
    workdir: Path, out: Path, *, dtype: str = "folder", student: str = "", which: str = "newest"
) -> int:
    """Exports the student of `workdir` to `out`; returns the number of its update.

    It reads the run and the student's folder, not the teacher's.

    Args:
      workdir: a run's.
      out: absent or empty.
      dtype: one of `hf.DTYPES`; "folder" is that of the student's folder, and of a new student
        the one in which it was trained.
      student: where the student's folder lies now; "": where the run's config says.
      which: the checkpoint (`find_step`).

    Raises:
      ValueError: no run or no such checkpoint in `workdir`, `out` is in use or may not be written,
        or the student's folder is not there or holds another model.
    """
    stored = workdir / "config.json"
    if not stored.is_file():
        raise ValueError(
            f"`--workdir`: `{workdir}` has no config.json; give a run's workdir"
            f"{closest_run(workdir)}"
        )
    hf.check_new_folder(out)  # reading a large checkpoint takes minutes
    bucket.check_may_write(out)
    if bucket.url_of(out) and bucket.names(out):
        raise ValueError(f"`{out}` must be absent; it is not overwritten")
    settings = _with_student(read_settings(read_stored(stored)), student, workdir)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=settings.checkpoint.keep)
    step = find_step(workdir, which, name="--workdir" if which == "newest" else "--step")
    began = find_student(settings)
    if dtype == "folder":
        dtype = hf.read_dtype(began.folder) if began.folder else settings.dtype
    sizes = began.sizes
    # Padding that the teacher lacks was cut from what was trained.
    if embed := checkpoints.shapes(step).get("params/embed"):
        sizes = dataclasses.replace(sizes, vocab_size=embed[0])
    state, _ = checkpoints.restore(step, {"params": _trained(settings, sizes)}, partial=True)
    params = with_adapters(_frozen(settings, began), state["params"], build.adapters(settings))
    tokenizer_from = began.tokenizer_from()
    hf.save_model(out, params, sizes, dtype=jnp.dtype(dtype), tokenizer_from=tokenizer_from)
    bucket.upload(out)
    return step


def _with_student(settings: Settings, student: str, workdir: Path) -> Settings:
    """The settings with the student where it lies now, checked to be the run's."""
    if settings.student == "new":
        if student:
            raise ValueError("`--student`: the run's student was new, and has no folder; omit it")
        return settings
    if student:
        settings = dataclasses.replace(settings, student=student)
    is_run = settings.student.startswith("workdir:")
    if not is_run and not (folder := model_folder(settings.student)).is_dir():
        raise ValueError(
            f"the student's folder `{folder}` does not exist; give where it lies now as "
            "`--student=DIR`"
        )
    check_models(settings, workdir, ["student"])
    return settings


def _frozen(settings: Settings, began: FoundModel) -> Params | None:
    """The parameters of the student that the run began with, if adapters of them were trained."""
    if not settings.lora.rank:
        return None
    host = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.local_devices(backend="cpu")[:1])
    return load_found(began, dtype=student_dtype(settings), mesh=host).params


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
    with reported():
        _, workdir, flags = parse_command_line(
            argv,
            usage=__doc__,
            needs_config=False,
            out=str,
            dtype=("folder", *hf.DTYPES),
            student="",
            step="newest",
        )
        out = bucket.place(flags["out"], name="--out", is_new=True)
        which, student = flags["step"], flags["student"]
        step = export(workdir, out, dtype=flags["dtype"], student=student, which=which)
        print_line(f"update {step} of {workdir} written to {out}", sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
