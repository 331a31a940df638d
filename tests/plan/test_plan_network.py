"""What programs send is counted from shapes."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from opd_jax.model import is_spec, param_specs
from opd_jax.plan import chips, network
from opd_jax.plan.__main__ import main
from opd_jax.plan.network import Sent
from opd_jax.plan.placement import Placement
from opd_jax.runtime.mesh import DECODING, TRAINING, abstract_mesh, gathered
from tests.models import TINY

PAPER = "--config=configs/alfworld_qwen3.py:student=1.7b,teacher=8b"
BF16 = jnp.dtype("bfloat16")


def place(**sizes: int) -> Placement:
    return Placement(abstract_mesh(**dict(data=1, fsdp=1, tensor=1) | sizes), "tpu")


def sharded_count(config) -> int:
    """Parameters, but those of the norms of queries and keys, which are replicated."""
    specs = jax.tree.leaves(param_specs(config), is_leaf=is_spec)
    return sum(math.prod(spec.shape) for spec in specs) - 2 * config.num_layers * config.head_dim


def test_a_token_waits_for_sums_over_the_shards_of_heads():
    for sizes in (dict(fsdp=2, tensor=2), dict(fsdp=2, decode=2)):
        where = place(**sizes)
        copy = where.params(TINY, "bfloat16", rules=gathered(DECODING))
        found = network.decoding(where, TINY, copy, rows=8, width=1, times=10)
        # After attention and after the feed-forward layer of two layers, of the embedding, and of
        # the logits, whose maxima and totals are small. In a ring of two a device sends as many
        # bytes as an array has: of its 4 rows.
        assert found == Sent(ahead=0, awaited=10 * 5 * 4 * TINY.d_model * 2, waits=10 * 6)
    alone = place(fsdp=4).params(TINY, "bfloat16", rules=gathered(DECODING))
    assert network.decoding(place(fsdp=4), TINY, alone, rows=8, width=1, times=10) == Sent()


def test_many_tokens_gather_sharded_weights_and_few_are_sent_to_them():
    where = place(fsdp=4)
    weights = where.params(TINY, "bfloat16", rules=DECODING)
    many = network.decoding(where, TINY, weights, rows=8, width=64, times=1)
    assert many == Sent(ahead=2 * sharded_count(TINY) * 3 / 4)
    few = network.decoding(where, TINY, weights, rows=4, width=1, times=1)
    assert few.ahead == 0 < few.awaited < many.ahead
    assert few.waits == 4 * TINY.num_layers


def test_training_gathers_weights_and_scatters_gradients():
    def sent(trained: bool, **sizes: int) -> Sent:
        where = place(**sizes)
        params = where.params(TINY, "float32", rules=TRAINING)
        return network.training(
            *(where, TINY, params, params if trained else None),
            **dict(tokens=16 * 32, parts=2, passes=3, dtype=BF16),
        )

    size = 2 * sharded_count(TINY)  # sent in bfloat16
    for sizes in (dict(fsdp=4), dict(fsdp=2, decode=2)):
        # Three passes over each of two micro-batches; in a ring of four a device sends 3/4.
        assert sent(False, **sizes) == Sent(ahead=2 * 3 * size * 3 / 4)
        assert sent(True, **sizes) == Sent(ahead=2 * (3 + 1) * size * 3 / 4)
    # An all-reduce over two, of all.
    assert sent(True, data=2) == Sent(ahead=size + 2 * 2 * TINY.num_layers * TINY.head_dim)
    sums = 3 * 2 * TINY.num_layers
    activations = 16 * 32 * TINY.d_model * 2
    assert sent(True, tensor=2) == Sent(0, sums * activations, waits=2 * sums)


def test_two_layouts_wait_less_than_either_of_them(in_process):
    def seconds(*mesh: str) -> float:
        flags = [f"--config.mesh.{size}" for size in mesh]
        text = in_process(*(main, PAPER, "--topology=v5e:4x8", "--compile=false", "--json"), *flags)
        plan = json.loads(text)["plan"]
        return plan["update_seconds"] + plan["waiting_seconds"]

    both = seconds("fsdp=32", "decode=8")
    assert both < seconds("fsdp=4", "tensor=8", "decode=1") < seconds("fsdp=32", "decode=1")


def test_gpus_are_planned_by_their_number():
    assert [where.chips for where in chips.slices("h100")][:4] == [1, 2, 4, 8]
    node, cluster = (chips.find(f"h100:{n}", local_chips=1).chip for n in (8, 16))
    assert (node.wires, cluster.wires) == (450e9, 50e9)  # NVLink, a network adapter
    assert node.platform == "gpu"  # as JAX names its backend
    with pytest.raises(ValueError, match=r"expected one of h100:1, .*got `h100:3`"):
        chips.find("h100:3", local_chips=1)
    with pytest.raises(ValueError, match=r"expected one of v5e, .*h200, .*got `b200`"):
        chips.find("b200:8", local_chips=1)
