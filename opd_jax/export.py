"""Write the newest checkpoint of a workdir as a Hugging Face folder.

    python -m opd_jax.export --workdir=DIR --out=DIR

`transformers` opens the result, and so do `student` and `teacher` of a config. Adapters are merged
into the weights that they adapt.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from opd_jax import config as cfg
from opd_jax import experiment, hf
from opd_jax.checkpoint import Checkpoints
from opd_jax.lora import merged
from opd_jax.mesh import make_mesh
from opd_jax.train_state import abstract_state


def export(workdir: Path, out: Path) -> int:
    """Export the student of `workdir` to `out`; returns the update it comes from.

    Raises:
      ValueError: no run or no checkpoint in `workdir`, or `out` is in use.
    """
    stored = workdir / "config.json"
    if not stored.is_file():
        raise ValueError(f"`--workdir`: `{workdir}` has no config.json; give a run's workdir")
    config = cfg.read_stored(stored)
    mesh = _mesh(config)
    student = experiment.load_student(config, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    untrained = experiment.initial_params(student, config, mesh)
    abstract = abstract_state(untrained, experiment.make_optimizer(config))
    restored = checkpoints.restore_latest(abstract)
    if restored is None:
        raise ValueError(f"`--workdir`: `{workdir}` has no checkpoint yet; let the run save one")
    step, state, _ = restored
    new = config.student == "new"
    params = experiment.student_params(state.params, student, config)
    hf.save_model(
        out,
        merged(params, student.config, dtype=jnp.dtype(config.dtype)),
        student.config,
        dtype=config.dtype,
        tokenizer_from=student.tokenizer if new else student.folder,
    )
    return step


def _mesh(config: FrozenConfigDict) -> jax.sharding.Mesh:
    """The run's mesh, or one device where there are fewer than the run had."""
    if math.prod(config.mesh.values()) <= jax.device_count():
        return make_mesh(**config.mesh)
    return make_mesh(data=1, fsdp=1, tensor=1)


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.export`."""
    try:
        _, workdir, flags = cfg.parse_command_line(argv, usage=__doc__, needs_config=False, out=str)
        step = export(workdir, Path(flags["out"]))
        print(f"update {step} of {workdir} written to {flags['out']}")
    except ValueError as error:
        cfg.fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
