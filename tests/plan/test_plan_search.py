"""`--search` ranks the meshes of a slice."""

import json
import math

from opd_jax.config import load
from opd_jax.plan import chips
from opd_jax.plan.__main__ import main
from opd_jax.plan.programs import plan_run
from opd_jax.plan.report import describe
from opd_jax.plan.search import _meshes
from opd_jax.runtime.mesh import MESH_AXES, MeshShape

QUICKSTART = "--config=configs/quickstart.py"


def test_every_mesh_of_a_slice_is_tried_once():
    shapes = [MeshShape(**mesh) for mesh in _meshes(8)]
    tried = [tuple(shape.axes.values()) for shape in shapes]
    assert len(set(tried)) == len(tried) == 20  # 8 = 2³: four exponents that add up to 3
    assert {math.prod(mesh) for mesh in tried} == {shape.devices for shape in shapes} == {8}


def test_meshes_are_ranked_by_what_bounds_an_update(in_process):
    flags = [QUICKSTART, "--topology=v5e:2x2", "--search", "--config.env.max_turns=4"]
    found = json.loads(in_process(main, *flags, "--json"))
    # Its vocabulary of 665 tokens does not divide over `decode` and `tensor`.
    assert {tuple(row[name] for name in MESH_AXES) for row in found} == {
        *((4, 1, 1, 1), (2, 2, 1, 1), (1, 4, 1, 1)),
    }
    seconds = [row["seconds, at least"] for row in found]
    assert seconds == sorted(seconds)
    where = chips.find("v5e:2x2", local_chips=1)
    for row in found:
        # Programs that were traced on another mesh are bounded as if they were traced on this one.
        mesh = [f"--config.mesh.{axis}={row[axis]}" for axis in ("data", "fsdp", "tensor")]
        alone = describe(plan_run(load("quickstart", [flags[-1], *mesh]), where), None)
        assert row["seconds, at least"] == alone["update_seconds"] + alone["waiting_seconds"]
        # Where nothing but the batch is split, nothing small is waited for.
        alone = row["fsdp"] == row["tensor"] == 1
        assert (row["of them waiting"] == 0) == alone
    shown = in_process(main, *flags).splitlines()
    assert [line.split("|")[1:5] for line in shown[2:]] == [
        [f" {row[name]:>{len(name)}} " for name in MESH_AXES] for row in found
    ]
