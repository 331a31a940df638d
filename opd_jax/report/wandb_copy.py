"""Copies a run's `metrics.jsonl` to Weights & Biases, in a process of its own.

    python -m opd_jax.report.wandb_copy WORKDIR PROJECT FROM

`wandb.WandbWriter` starts it. It follows the file until stdin closes, and prints the number of each
update that it has handed over. FROM is the update that the run goes on from; 0 begins a new one.
It imports neither JAX nor anything of the run, so a service that hangs or fails costs the run
nothing.
"""

import json
import os
import secrets
import select
import sys
from pathlib import Path
from typing import Any

# In the workdir: the id of the W&B run, and the last update that it was given.
STATE = "wandb.json"
_LOOK_S = 0.5


def follow(workdir: Path, project: str, resume_step: int) -> None:
    """Copies lines until stdin closes, then waits for the service to take what is left."""
    import wandb

    state = _state(workdir / STATE, resume_step)
    run = wandb.init(
        project=project,
        id=state["id"],
        resume="allow",
        dir=str(workdir),
        name=workdir.name,
        config=json.loads((workdir / "config.json").read_text("utf-8")),
    )
    with (workdir / "metrics.jsonl").open(encoding="utf-8") as file:
        open_, rest = True, ""
        while open_:
            if select.select([sys.stdin], [], [], _LOOK_S)[0]:
                open_ = bool(os.read(sys.stdin.fileno(), 1024))
            *lines, rest = (rest + file.read()).split("\n")
            for line in map(json.loads, lines):
                step = line.pop("step")
                if step > state["step"]:
                    run.log(_scalars(line), step=step)
                    state["step"] = step
                    _write(workdir / STATE, state)
                print(step, flush=True)
    run.finish()


def _state(path: Path, resume_step: int) -> dict[str, Any]:
    """The id and the last update of the W&B run to go on with, or of a new one.

    W&B takes each step once, in order. So updates that are done again are not sent again.
    """
    if resume_step and path.exists():
        return json.loads(path.read_text("utf-8"))
    state = {"id": secrets.token_hex(8), "step": 0}
    _write(path, state)
    return state


def _write(path: Path, state: dict[str, Any]) -> None:
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps(state), "utf-8")
    whole.replace(path)


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    """Numbers by name; entry k of a list is `name/k`."""
    scalars: dict[str, Any] = {}
    for name, value in line.items():
        if isinstance(value, list):
            scalars |= {f"{name}/{k}": part for k, part in enumerate(value)}
        else:
            scalars[name] = value
    return {name: value for name, value in scalars.items() if value is not None}


if __name__ == "__main__":
    follow(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
