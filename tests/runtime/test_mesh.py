"""The mesh, the rules, and the arrays that are sharded by them."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from models import TINY

from opd_jax.model import ParamSpec, cache_specs, init_arrays, is_spec, param_specs
from opd_jax.model.lora import Lora, lora_specs
from opd_jax.model.moe import Experts
from opd_jax.plan.collectives import collectives
from opd_jax.plan.hlo import parse
from opd_jax.runtime import mesh as mesh_lib
from opd_jax.runtime.mesh import (
    DECODING,
    TRAINING,
    MeshShape,
    batch_sharding,
    make_mesh,
    param_shardings,
    replicated,
    shard_batch,
)

CONFIG = replace(TINY, vocab_size=64, d_model=32, head_dim=16, d_ff=48, qkv_bias=True)


@pytest.mark.parametrize("sizes", [(1, 4, 2), (1, 1, 1), (1, 2, 3)])
def test_a_single_process_may_leave_devices_unused(sizes: tuple[int, int, int]) -> None:
    mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor")) == sizes
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(mesh.devices.flat) == set(jax.devices()[: math.prod(sizes)])
    chosen = make_mesh(data=2, fsdp=1, tensor=1, devices=jax.devices()[2:4])
    assert set(chosen.devices.flat) == set(jax.devices()[2:4])


def test_several_processes_must_use_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert make_mesh(data=2, fsdp=2, tensor=2).size == 8
    with pytest.raises(
        ValueError, match="exactly the 8 devices of 2 processes, got 1 × 2 × 3 = 6; change"
    ):
        make_mesh(data=1, fsdp=2, tensor=3)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((1, 3, 3), "1 × 3 × 3 = 9"),
        ((-2, -4, 1), "-2 × -4 × 1 = 8"),
        ((0, 8, 1), "0 × 8 × 1 = 0"),
    ],
)
def test_a_mesh_that_does_not_exist_is_refused(sizes: tuple[int, int, int], text: str) -> None:
    with pytest.raises(ValueError, match=f"at most 8 devices, got {text}"):
        make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])


def test_every_logical_axis_of_the_model_has_a_rule() -> None:
    mixture = replace(CONFIG, experts=Experts(count=4, per_token=2, d_ff=16, normalized=True))
    cache = cache_specs(CONFIG, batch=8, slots=4)
    adapters = lora_specs(CONFIG, Lora(rank=2, alpha=1.0, targets=("q",), int8=False))
    trees = [param_specs(CONFIG), param_specs(mixture), adapters, cache]
    axes = {a for spec in jax.tree.leaves(trees, is_leaf=is_spec) for a in spec.axes}
    # Only the batch of activations that are sent to weights has an axis of its own.
    assert axes | {"decode_batch"} == set(mesh_lib.TRAINING) == set(mesh_lib.DECODING)


def test_parameters_follow_the_rules() -> None:
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    shardings = param_shardings(param_specs(CONFIG), mesh)
    assert shardings["embed"].spec == PartitionSpec("tensor", "fsdp")
    assert shardings["layers"]["q"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert shardings["layers"]["q"].shard_shape((2, 32, 4, 16)) == (2, 8, 2, 16)
    assert shardings["layers"]["down"].shard_shape((2, 48, 32)) == (2, 24, 8)
    assert shardings["head"].shard_shape((32, 64)) == (8, 32)


@pytest.mark.parametrize(
    ("fsdp", "decode", "axes"),
    [(32, 8, (4, 8)), (8, 8, (1, 8)), (1, 8, (1, 1)), (12, 8, (3, 4)), (6, 1, (6, 1))],
)
def test_as_many_fsdp_devices_decode_together_as_divide_them(
    fsdp: int, decode: int, axes: tuple[int, int]
) -> None:
    shape = MeshShape(data=2, fsdp=fsdp, decode=decode, tensor=3)
    assert tuple(shape.axes.values()) == (2, *axes, 3)
    assert shape.devices == 6 * fsdp
    assert (shape.batch_shards, shape.decode_shards) == (2 * fsdp, 2 * axes[0])


def test_the_axis_decode_is_fsdp_in_training_and_tensor_in_decoding() -> None:
    both = make_mesh(data=1, fsdp=2, decode=4, tensor=1)
    specs, rows = param_specs(replace(CONFIG, num_kv_heads=4)), np.zeros((8, 3))
    for rules, alone in (
        (TRAINING, make_mesh(data=1, fsdp=8, tensor=1)),
        (DECODING, make_mesh(data=1, fsdp=2, tensor=4)),
    ):
        mine, other = (param_shardings(specs, mesh, rules=rules) for mesh in (both, alone))
        shapes = jax.tree.map(lambda spec: spec.shape, specs, is_leaf=is_spec)
        where = partial(jax.tree.map, lambda sharding, shape: sharding.devices_indices_map(shape))
        assert where(mine, shapes) == where(other, shapes)
        parts = [shard_batch(rows, mesh, rules=rules).sharding for mesh in (both, alone)]
        assert parts[0].is_equivalent_to(parts[1], 2)


def test_random_parameters_are_created_in_shards() -> None:
    embed = {"embed": ParamSpec((4096, 64), ("vocab", "embed"), 0.02)}
    shardings = param_shardings(embed, make_mesh(data=1, fsdp=4, tensor=2))
    init = jax.jit(partial(init_arrays, embed, dtype=jnp.float32), out_shardings=shardings)
    compiled = init.lower(jax.random.key(0)).compile()
    memory, total = compiled.memory_analysis(), 4 * 4096 * 64
    assert total / 8 <= memory.output_size_in_bytes < total / 7
    # Not created replicated and then sliced, and not sent.
    assert memory.temp_size_in_bytes < total / 2
    assert collectives(parse(compiled.as_text())) == []


def test_indivisible_parameter_is_named() -> None:
    mesh = make_mesh(data=1, fsdp=1, tensor=8)
    with pytest.raises(
        ValueError, match=r"`layers/k` \(2, 32, 2, 16\).*`kv_heads` = 2.*tensor` = 8"
    ):
        param_shardings(
            {
                "layers": {
                    "k": ParamSpec((2, 32, 2, 16), ("layer", "embed", "kv_heads", "head_dim"), 1)
                }
            },
            mesh,
        )


def test_a_batch_is_sharded_over_data_and_fsdp() -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    host = {"tokens": np.arange(24).reshape(8, 3), "reward": np.arange(8.0, dtype=np.float32)}
    batch = shard_batch(host, mesh)
    assert batch["tokens"].sharding.is_equivalent_to(batch_sharding(mesh), 2)
    assert {s.data.shape for s in batch["tokens"].addressable_shards} == {(2, 3)}
    for name, array in host.items():
        np.testing.assert_array_equal(batch[name], array)
    copies = jax.device_put(np.arange(6), replicated(mesh))
    assert [s.data.shape for s in copies.addressable_shards] == [(6,)] * 8


@pytest.mark.parametrize("array", [np.zeros((6, 3)), np.float32(1)])
def test_indivisible_batch_is_named(array: np.ndarray) -> None:
    mesh = make_mesh(data=2, fsdp=4, tensor=1)
    with pytest.raises(ValueError, match=r"`episode/tokens`.*2 × 4 × 1 = 8"):
        shard_batch({"episode": {"tokens": array}}, mesh)


def test_a_shard_map_sees_the_shards_of_its_device_and_sums_the_results() -> None:
    mesh = make_mesh(data=2, fsdp=1, tensor=4)
    x, w = np.arange(8.0, dtype=np.float32).reshape(2, 4), np.ones((4, 8, 3), np.float32)
    shapes = []

    def matmul(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
        shapes.append((x.shape, w["w"].shape))
        return x @ jnp.sum(w["w"], axis=1)

    @jax.jit
    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        assert mesh_lib.shards("batch") == (1 if jax.sharding.get_abstract_mesh().empty else 2)
        sharded = mesh_lib.shard_map(
            matmul,
            in_axes=(("batch", None), {"w": (None, "mlp", None)}),
            out_axes=("batch", None),
            summed="mlp",
            rules=TRAINING,
        )
        return sharded(x, {"w": w})

    want = x @ w.sum(axis=1)
    np.testing.assert_array_equal(run(x, w), want)
    assert shapes == [((2, 4), (4, 8, 3))]
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(run(jax.device_put(x, batch_sharding(mesh)), w), want)
        assert shapes[1:] == [((1, 4), (4, 2, 3))]
