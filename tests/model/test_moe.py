"""Mixtures of experts: against `transformers`, against loops in float64, on a mesh and in int8."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from models import TINY
from numpy.testing import assert_allclose, assert_array_equal

from opd_jax import hf, model
from opd_jax.model import ModelConfig, Params, moe
from opd_jax.model.int8 import contracted_axes, int8_specs, quantize_params
from opd_jax.model.moe import Experts
from opd_jax.model.projections import Int8Weight, project_groups
from opd_jax.plan.collectives import collectives
from opd_jax.plan.hlo import parse
from opd_jax.runtime.mesh import make_mesh, param_shardings, shard_batch

pytestmark = pytest.mark.usefixtures("compile_quickly")

MIXTURES = ("qwen3_moe", "qwen3_moe_shares")
EXPERTS = Experts(count=6, per_token=2, d_ff=8, normalized=True)
CONFIG = replace(TINY, num_kv_heads=4, experts=EXPERTS)


def run(params: Params, tokens: np.ndarray, config: ModelConfig = CONFIG) -> np.ndarray:
    forward = jax.jit(partial(model.forward, config=config, query_chunk=8, remat="none"))
    return np.asarray(forward(params, tokens) @ model.head(params))


def load(folder: Path, **options: Any) -> tuple[ModelConfig, Params]:
    config = hf.read_config(folder)
    return config, hf.load_params(folder, config, **{"dtype": jnp.float32} | options)


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest, references: dict) -> Any:
    """A tiny random model of `transformers`, with weights that sum to one and that do not."""
    return references[request.param]


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 96, (3, 19))


# --- Against transformers -------------------------------------------------------------------------


def test_logits_match_transformers(mixture: Any, tokens: np.ndarray) -> None:
    import torch

    config, params = load(mixture.folder)
    assert config.experts == Experts(
        count=8, per_token=3, d_ff=24, normalized=mixture.model.config.norm_topk_prob
    )
    with torch.no_grad():
        expected = mixture.model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected).max() > 1  # else 1e-5 would say little
    assert_allclose(run(params, tokens, config), expected, rtol=0, atol=1e-5)


def test_the_two_kinds_of_weights_are_different_models(references: dict, tokens: Any) -> None:
    config, params = load(references["qwen3_moe"].folder)
    other = replace(config, experts=replace(config.experts, normalized=False))
    assert np.abs(run(params, tokens, config) - run(params, tokens, other)).max() > 0.1


def test_cached_pieces_equal_one_forward(mixture: Any, tokens: np.ndarray) -> None:
    config, params = load(mixture.folder)
    expected = run(params, tokens, config)
    append = jax.jit(partial(model.forward_cached, config=config, sharded=False))
    cache = model.init_cache(config, batch=3, slots=24, dtype=jnp.float32, layout="BSGH")
    done = np.zeros(3, int)
    # Rows of different lengths: what fills a piece goes to experts too, and changes nothing.
    for counts in ([7, 0, 3], [7, 7, 7], [5, 7, 1]):
        piece = np.full((3, 7), 95)
        for row, count in enumerate(counts):
            piece[row, :count] = tokens[row, done[row] : done[row] + count]
        hidden, cache = append(params, cache, piece, jnp.array(counts))
        logits = np.asarray(hidden @ model.head(params))
        for row, count in enumerate(counts):
            want = expected[row, done[row] : done[row] + count]
            assert_allclose(logits[row, :count], want, rtol=0, atol=2e-5)
        done += counts


def test_gradient_matches_torch(mixture: Any, tokens: np.ndarray) -> None:
    import torch

    config, params = load(mixture.folder)
    weight = np.random.default_rng(1).normal(size=(3, 5, 96)).astype(np.float32) / 100

    @jax.jit
    @jax.grad
    def gradient(params: Params) -> jax.Array:
        hidden = model.forward(params, tokens[:, :5], config=config, query_chunk=8, remat="layers")
        return jnp.sum(hidden @ model.head(params) * weight)

    got = jax.tree.map(np.asarray, gradient(params)["layers"])
    network = mixture.model
    network.zero_grad()
    (network(torch.tensor(tokens[:, :5])).logits * torch.tensor(weight)).sum().backward()
    block = network.model.layers[1].mlp
    gate, up = np.split(block.experts.gate_up_proj.grad.numpy().transpose(0, 2, 1), 2, axis=2)
    pairs = {
        "router": block.gate.weight.grad.numpy().T,
        "expert_gate": gate,
        "expert_up": up,
        "expert_down": block.experts.down_proj.grad.numpy().transpose(0, 2, 1),
    }
    for name, want in pairs.items():
        assert_allclose(got[name][1], want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))
    network.zero_grad()


# --- One layer ------------------------------------------------------------------------------------


def silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def test_two_tokens_by_hand() -> None:
    # Router probabilities 1/8, 2/8, 5/8 of token 0 and 6/10, 1/10, 3/10 of token 1.
    layer = {
        "router": np.log([[1.0, 2.0, 5.0], [6.0, 1.0, 3.0]]),
        "expert_gate": np.array([[[1.0], [2.0]], [[3.0], [-1.0]], [[0.5], [4.0]]]),
        "expert_up": np.array([[[2.0], [1.0]], [[1.0], [1.0]], [[-2.0], [3.0]]]),
        "expert_down": np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 2.0]]]),
    }
    # Token 0 is the first unit vector and takes experts 2 and 1; token 1, the second, 0 and 2.
    first = np.array([1.0, 2.0]) * silu(0.5) * -2
    second = np.array([0.0, 1.0]) * silu(3.0) * 1
    third = np.array([1.0, 0.0]) * silu(2.0) * 1
    fourth = np.array([1.0, 2.0]) * silu(4.0) * 3
    wants = {
        True: [first * 5 / 7 + second * 2 / 7, third * 2 / 3 + fourth * 1 / 3],
        False: [first * 5 / 8 + second * 2 / 8, third * 0.6 + fourth * 0.3],
    }
    layer = {name: jnp.asarray(value, jnp.float32) for name, value in layer.items()}
    for normalized, want in wants.items():
        experts = Experts(count=3, per_token=2, d_ff=1, normalized=normalized)
        got = moe.feed_forward(layer, jnp.eye(2)[None], experts, all_gather=True)
        assert_allclose(got[0], want, rtol=1e-6, atol=5e-7)  # a difference of terms up to 1.4


def random_layer(rng: np.random.Generator) -> dict[str, np.ndarray]:
    E, D, F = 6, 16, 8
    shapes = {"expert_gate": (E, D, F), "expert_up": (E, D, F), "expert_down": (E, F, D)}
    layer = {name: rng.normal(size=shape) / 3 for name, shape in shapes.items()}
    return layer | {"router": rng.normal(size=(D, E))}


def by_loops(layer: dict[str, np.ndarray], x_MD: np.ndarray, experts: Experts) -> np.ndarray:
    """The layer in float64, one token and one expert at a time."""
    out = np.zeros_like(x_MD)
    for row, x in enumerate(x_MD):
        probs = np.exp(x @ layer["router"])
        probs /= probs.sum()
        chosen = np.argsort(-probs)[: experts.per_token]
        weights = probs[chosen] / (probs[chosen].sum() if experts.normalized else 1)
        for weight, e in zip(weights, chosen, strict=True):
            gate, up = x @ layer["expert_gate"][e], x @ layer["expert_up"][e]
            out[row] += weight * ((silu(gate) * up) @ layer["expert_down"][e])
    return out


apply = jax.jit(moe.feed_forward, static_argnames=("experts", "all_gather"))


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("per_token", [1, 2, 6])
def test_any_choice_of_experts_equals_loops(per_token: int, normalized: bool) -> None:
    rng = np.random.default_rng(0)
    layer = random_layer(rng)
    layer["router"][:, 4] = 0  # logit 0, in the middle of the others
    experts = replace(EXPERTS, per_token=per_token, normalized=normalized)
    x = rng.normal(size=(2, 5, 16))
    got = apply(layer, x.astype(np.float32), experts=experts, all_gather=True)
    want = by_loops(layer, x.reshape(10, 16), experts).reshape(2, 5, 16)
    assert np.abs(want).max() > 0.3
    assert_allclose(got, want, rtol=0, atol=3e-6)


def test_experts_that_nobody_takes_and_one_that_all_take() -> None:
    rng = np.random.default_rng(1)
    layer = random_layer(rng)
    x = np.abs(rng.normal(size=(1, 7, 16)))
    layer["router"][:, 3] = 9.0  # of a positive token, far above the others
    experts = replace(EXPERTS, per_token=1)
    _, chosen = moe.route(jnp.float32(x[0]) @ jnp.float32(layer["router"]), experts)
    assert_array_equal(chosen, 3)
    got = apply(layer, x.astype(np.float32), experts=experts, all_gather=True)
    assert_allclose(got[0], by_loops(layer, x[0], experts), rtol=0, atol=3e-6)


@pytest.mark.parametrize("sizes", [(2, 0, 3), (0, 0, 5), (0, 4, 0), (5, 0, 0)])
def test_groups_of_any_size_meet_their_own_matrix(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    rows = sum(sizes)
    group = np.repeat(np.arange(3), sizes)
    x, weight = rng.normal(size=(rows, 4)), rng.normal(size=(3, 4, 6))
    got = project_groups(
        jnp.float32(x), jnp.float32(weight), jnp.asarray(group), jnp.array(sizes), dtype=jnp.float32
    )
    want = np.stack([x[row] @ weight[group[row]] for row in range(rows)])
    assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_token_is_computed_as_if_it_were_alone() -> None:
    rng = np.random.default_rng(3)
    layer = random_layer(rng)
    x = rng.normal(size=(1, 9, 16)).astype(np.float32)
    broken = x.copy()
    broken[0, 4:] = np.nan  # as activations of padding may be
    alone = partial(apply, layer, experts=EXPERTS, all_gather=True)
    assert_array_equal(np.asarray(alone(broken))[:, :4], np.asarray(alone(x))[:, :4])


# --- On a mesh ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params(random_params: Callable) -> Params:
    return jax.tree.map(jnp.asarray, random_params(CONFIG, seed=1))


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 32, (8, 7))


def on_mesh(params: Params, sizes: tuple[int, int, int], int8: bool) -> tuple[Params, Params, Mesh]:
    """Parameters in int8 if asked for, the same split over a mesh, and the mesh."""
    if int8:
        params = jax.jit(quantize_params, static_argnames="config")(params, CONFIG)
    mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    specs = int8_specs(CONFIG) if int8 else model.param_specs(CONFIG)
    return params, jax.device_put(params, param_shardings(specs, mesh)), mesh


@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize("int8", [False, True])
def test_a_mesh_computes_what_one_device_does(
    params: Params, rows: np.ndarray, sizes: tuple[int, int, int], int8: bool
) -> None:
    params, placed, mesh = on_mesh(params, sizes, int8)
    part = placed["layers"]["expert_gate"]
    values = part.values if int8 else part
    assert values.addressable_shards[0].data.shape == (2, 6, 16 // sizes[1], 8 // sizes[2])
    with jax.set_mesh(mesh):
        got = run(placed, shard_batch({"tokens": rows}, mesh)["tokens"])
    want = run(params, rows)
    assert_allclose(got, want, rtol=0, atol=3e-6 * np.abs(want).max())


@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize("int8", [False, True])
def test_experts_that_stay_where_they_are_give_the_same(
    params: Params, rows: np.ndarray, sizes: tuple[int, int, int], int8: bool
) -> None:
    params, placed, mesh = on_mesh(params, sizes, int8)

    @jax.jit
    def token(params: Params, tokens: jax.Array) -> jax.Array:
        kv = model.init_cache(CONFIG, batch=8, slots=8, dtype=jnp.float32, layout="BGSH")
        one = jnp.ones(8, jnp.int32)
        return model.forward_cached(params, kv, tokens, one, config=CONFIG, sharded=True)[0]

    with jax.set_mesh(mesh):
        arguments = placed, shard_batch({"tokens": rows[:, :1]}, mesh)["tokens"]
        got = token(*arguments)
        sent = collectives(parse(token.lower(*arguments).compile().as_text()))
    want = token(params, rows[:, :1])
    assert_allclose(got, want, rtol=0, atol=3e-6 * np.abs(want).max())
    # No array of all experts, which is one of weights: not even a part of each.
    assert sent
    assert not [part for part in sent if re.search(r"\[(\d,)?6,\d+,\d+\]", part.shape)]


@pytest.mark.parametrize("count", [1, 3])
def test_rows_that_do_not_divide_over_a_mesh_are_computed_on_all_of_it(
    params: Params, rows: np.ndarray, count: int
) -> None:
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    placed = jax.device_put(params, param_shardings(model.param_specs(CONFIG), mesh))
    with jax.set_mesh(mesh):
        got = run(placed, rows[:count])
    want = run(params, rows[:count])
    assert_allclose(got, want, rtol=0, atol=3e-6 * np.abs(want).max())


def test_a_mesh_gives_the_gradient_of_one_device(params: Params, rows: np.ndarray) -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    weight = np.random.default_rng(5).normal(size=(8, 7, 32)).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(params: Params, tokens: jax.Array) -> jax.Array:
        hidden = model.forward(params, tokens, config=CONFIG, query_chunk=8, remat="layers")
        return jnp.sum(hidden @ model.head(params) * weight)

    placed = jax.device_put(params, param_shardings(model.param_specs(CONFIG), mesh))
    with jax.set_mesh(mesh):
        got = gradient(placed, shard_batch({"tokens": rows}, mesh)["tokens"])
    for (path, mine), whole in zip(
        jax.tree_util.tree_leaves_with_path(got),
        jax.tree.leaves(gradient(params, rows)),
        strict=True,
    ):
        name, size = jax.tree_util.keystr(path), np.abs(whole).max()
        assert size > 0, name
        assert_allclose(mine, whole, rtol=0, atol=1e-5 * size, err_msg=name)


# --- In int8 --------------------------------------------------------------------------------------


def test_experts_have_a_scale_for_each_of_their_output_channels(
    params: Params, rows: np.ndarray
) -> None:
    int8 = jax.jit(quantize_params, static_argnames="config")(params, CONFIG)
    specs = model.param_specs(CONFIG)["layers"]
    kinds = {key for key, leaf in int8["layers"].items() if isinstance(leaf, Int8Weight)}
    assert kinds == {*"qkvo", "expert_gate", "expert_up", "expert_down"}  # and not the router
    gate, down = int8["layers"]["expert_gate"], int8["layers"]["expert_down"]
    assert gate.scale.shape == (2, 6, 8)
    assert down.scale.shape == (2, 6, 16)
    largest = np.abs(params["layers"]["expert_down"]).max(axis=2)
    assert_allclose(down.scale, largest / 127, rtol=1e-6)
    floats = {
        key: leaf.values * jnp.expand_dims(leaf.scale, contracted_axes(key, specs[key]))
        if isinstance(leaf, Int8Weight)
        else leaf
        for key, leaf in int8["layers"].items()
    }
    got, want = run(int8, rows), run({**int8, "layers": floats}, rows)
    assert_allclose(got, want, rtol=0, atol=3e-6 * np.abs(want).max())


# --- Folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2)])
def test_sharded_load_equals_unsharded(references: dict, sizes: tuple[int, int, int]) -> None:
    folder = references["qwen3_moe"].folder
    mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    config, plain = load(folder)
    jax.tree.map(assert_array_equal, load(folder, mesh=mesh)[1], plain)
    state = references["qwen3_moe"].model.state_dict()
    second = state["model.layers.1.mlp.experts.down_proj"][5].numpy()
    assert_array_equal(plain["layers"]["expert_down"][1, 5], second.T)
    router = state["model.layers.0.mlp.gate.weight"].numpy()
    assert_array_equal(plain["layers"]["router"][0], router.T)
    int8 = load(folder, dtype=jnp.bfloat16, int8=True, mesh=mesh)[1]
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), plain)
    want = jax.jit(quantize_params, static_argnames="config")(low, config)
    jax.tree.map(assert_array_equal, int8, want)


def test_an_exported_mixture_is_the_one_that_was_read(
    mixture: Any, tokenizer: Any, tmp_path: Path, tokens: np.ndarray
) -> None:
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    config, params = load(mixture.folder)
    out = tmp_path / "model"
    hf.save_model(out, params, config, dtype=jnp.float32, tokenizer_from=tokenizer)
    written, source = (load_file(f / "model.safetensors") for f in (out, mixture.folder))
    assert written.keys() == source.keys()
    for name, tensor in source.items():
        assert_array_equal(written[name], tensor)
    assert hf.read_config(out) == config
    opened, problems = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(problems.values())
    with torch.no_grad():
        got, want = (network(torch.tensor(tokens)).logits for network in (opened, mixture.model))
    assert torch.equal(got, want)


def write_config(folder: Path, source: Path, changes: dict) -> Path:
    raw = json.loads((source / "config.json").read_text()) | changes
    kept = {key: value for key, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def test_config_of_the_hub(references: dict, tmp_path: Path) -> None:
    # As Qwen3-30B-A3B has it: another name for the number of experts.
    source = references["qwen3_moe"].folder
    old = {"num_local_experts": None, "num_experts": 8, "mlp_only_layers": []}
    assert hf.read_config(write_config(tmp_path, source, old)) == hf.read_config(source)
    silent = {"norm_topk_prob": None, "decoder_sparse_step": None, "mlp_only_layers": None}
    experts = hf.read_config(write_config(tmp_path, source, silent)).experts
    assert experts == hf.read_config(references["qwen3_moe_shares"].folder).experts


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"decoder_sparse_step": 2}, "unsupported `decoder_sparse_step` = 2 .*supported: 1"),
        ({"mlp_only_layers": [0]}, r"unsupported `mlp_only_layers` = \[0\] .*supported: \[\]"),
        (
            {"shared_expert_intermediate_size": 16},
            "unsupported `shared_expert_intermediate_size` = 16 .*supported: 0",
        ),
        ({"num_experts_per_tok": 9}, "`num_experts_per_tok` = 9 .*at most num_experts = 8"),
        ({"num_local_experts": None}, "`num_experts` in config.json must be a positive int"),
        ({"moe_intermediate_size": 0}, "`moe_intermediate_size` .* positive int, got 0"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "'Qwen2MoeForCausalLM'.*Qwen3MoeForCausalLM"),
    ],
)
def test_what_is_not_computed_is_refused(
    references: dict, tmp_path: Path, changes: dict, text: str
) -> None:
    write_config(tmp_path, references["qwen3_moe"].folder, changes)
    with pytest.raises(ValueError, match=f"`{tmp_path}`.*{text}"):
        hf.read_config(tmp_path)


def test_a_missing_expert_is_named(references: dict, tmp_path: Path) -> None:
    source = references["qwen3_moe"].folder
    write_config(tmp_path, source, {"num_local_experts": 9})
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"lacks tensor `model.layers.0.mlp.experts.8.down_proj"):
        load(tmp_path)


def test_a_mixture_without_an_architecture_is_not_exported(
    params: Params, tokenizer: Any, tmp_path: Path
) -> None:
    config = replace(CONFIG, qk_norm=False)
    layers = {k: v for k, v in params["layers"].items() if k not in ("q_norm", "k_norm")}
    with pytest.raises(ValueError, match=r"`qk_norm` = False .* and experts; such a model"):
        hf.save_model(
            tmp_path / "out",
            {**params, "layers": layers},
            config,
            dtype=jnp.float32,
            tokenizer_from=tokenizer,
        )
