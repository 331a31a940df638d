"""Write the newest checkpoint of a workdir as a Hugging Face folder.

    python -m opd_jax.export --workdir=DIR --out=DIR

`transformers` opens the result, and so do `student` and `teacher` of a config. Adapters are merged
into the weights that they adapt. No accelerator is used: the host reads the parameters, however
many devices they were trained on, without the optimizer's moments, and writes them file by file.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from opd_jax import config as cfg
from opd_jax import hf
from opd_jax.config import build as experiment
from opd_jax.model import ModelConfig, Params, is_spec, param_specs
from opd_jax.model.lora import lora_specs, with_adapters
from opd_jax.runtime.checkpoint import Checkpoints
from opd_jax.runtime.mesh import make_mesh


def export(workdir: Path, out: Path) -> int:
    """Export the student of `workdir` to `out`; returns the update it comes from.

    Raises:
      ValueError: no run or no checkpoint in `workdir`, or `out` is in use.
    """
    stored = workdir / "config.json"
    if not stored.is_file():
        raise ValueError(f"`--workdir`: `{workdir}` has no config.json; give a run's workdir")
    config = cfg.read_stored(stored)
    sizes = experiment.student_sizes(config)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    restored = checkpoints.restore_latest({"params": _trained(config, sizes)}, partial=True)
    if restored is None:
        raise ValueError(f"`--workdir`: `{workdir}` has no checkpoint yet; let the run save one")
    step, state, _ = restored
    params = with_adapters(_frozen(config), state["params"], experiment.make_lora(config.lora))
    new = config.student == "new"
    tokenizer = experiment.new_sizes(config)[1] if new else experiment.model_folder(config.student)
    hf.save_model(out, params, sizes, dtype=config.dtype, tokenizer_from=tokenizer)
    return step


def _trained(config: FrozenConfigDict, sizes: ModelConfig) -> Params:
    """Shapes of what was trained, without a placement: to be read to the host."""
    lora = experiment.make_lora(config.lora)
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(config.dtype)),
        lora_specs(sizes, lora) if lora else param_specs(sizes),
        is_leaf=is_spec,
    )


def _frozen(config: FrozenConfigDict) -> Params | None:
    """What adapters adapt, on the host; None where all parameters were trained."""
    if not config.lora.rank:
        return None
    host = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.local_devices(backend="cpu")[:1])
    return experiment.load_student(config, host).params


def main(argv: Sequence[str]) -> None:
    """The command `python -m opd_jax.export`."""
    # Else it would take the memory of accelerators, which it does not use.
    jax.config.update("jax_platforms", "cpu")
    try:
        _, workdir, flags = cfg.parse_command_line(argv, usage=__doc__, needs_config=False, out=str)
        step = export(workdir, Path(flags["out"]))
        print(f"update {step} of {workdir} written to {flags['out']}")
    except ValueError as error:
        cfg.fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
