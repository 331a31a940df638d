"""The model against `transformers`, and its two ways of running against each other."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import hf, model
from opd_jax.model.attention import _SPANS
from opd_jax.runtime.mesh import make_mesh, shard_batch

pytestmark = pytest.mark.usefixtures("compile_quickly")

LENGTHS = [19, 11, 4]  # right-padded rows
T = max(LENGTHS)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 96, (len(LENGTHS), T))


def load(reference: Any) -> tuple[model.ModelConfig, model.Params]:
    config = hf.read_config(reference.folder)
    return config, hf.load_params(reference.folder, config, dtype=jnp.float32)


@pytest.fixture
def loaded(reference: Any) -> tuple[model.ModelConfig, model.Params]:
    return load(reference)


def hidden_states(config: model.ModelConfig, params: model.Params, tokens: np.ndarray) -> jax.Array:
    run = jax.jit(partial(model.forward, config=config, query_chunk=8, remat="none"))
    return run(params, tokens)


def test_logits_match_transformers(reference: Any, loaded: tuple, tokens: np.ndarray) -> None:
    import torch

    config, params = loaded
    mask = torch.tensor(np.arange(T) < np.array(LENGTHS)[:, None])
    with torch.no_grad():
        expected = reference.model(torch.tensor(tokens), attention_mask=mask.long()).logits.numpy()
    logits = np.asarray(hidden_states(config, params, tokens) @ model.head(params))
    assert np.abs(expected).max() > 1  # else 1e-5 would say little
    real = mask.numpy()
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=1e-5)


def test_forward_on_a_mesh_equals_one_device(references: dict, tokens: np.ndarray) -> None:
    config, params = load(references["qwen3"])
    expected = hidden_states(config, params, tokens)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    sharded = hf.load_params(references["qwen3"].folder, config, dtype=jnp.float32, mesh=mesh)
    rows = shard_batch({"tokens": np.concatenate([tokens, tokens[:1]])}, mesh)["tokens"]
    hidden = hidden_states(config, sharded, rows)
    np.testing.assert_allclose(hidden[:3], expected, rtol=0, atol=1e-5)


def test_rope_frequencies_match_transformers(reference: Any) -> None:
    config = hf.read_config(reference.folder)
    expected = reference.model.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(model.rope_frequencies(config), expected, rtol=1e-6)


def test_llama_scaling_reaches_all_three_bands(references: dict) -> None:
    config = hf.read_config(references["llama"].folder)
    plain = model.rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    ratio = plain / model.rope_frequencies(config)
    assert ratio.min() == 1
    assert ratio.max() == pytest.approx(config.rope_scaling.factor)
    assert ((ratio > 1.01) & (ratio < 0.99 * config.rope_scaling.factor)).any()


def test_parameters_are_those_of_transformers(reference: Any, loaded: tuple) -> None:
    config, params = loaded
    assert sum(x.size for x in jax.tree.leaves(params)) == reference.model.num_parameters()
    specs = model.param_specs(config)
    shapes = jax.tree.map(lambda spec: spec.shape, specs, is_leaf=model.is_spec)
    assert jax.tree.map(lambda x: x.shape, params) == shapes


# Tokens appended to each row in each call; a row may pause.
PIECES = [[7, 0, 3], [5, 7, 1], [0, 4, 0], [7, 0, 0]]


@pytest.mark.parametrize(
    ("name", "layout"),
    [("qwen3", "BGSH"), ("qwen3_tied", "BSGH"), ("qwen2", "BSGH"), ("llama", "BGSH")],
)
def test_cached_pieces_equal_one_forward(
    references: dict, tokens: np.ndarray, name: str, layout: str
) -> None:
    config, params = load(references[name])
    expected = np.asarray(hidden_states(config, params, tokens))
    append = jax.jit(partial(model.forward_cached, config=config, sharded=False))
    cache = model.init_cache(config, batch=3, slots=24, dtype=jnp.float32, layout=layout)
    done = np.zeros(3, int)
    for counts in PIECES:
        piece = np.full((3, max(map(max, PIECES))), 95)  # what stands beyond the count is dropped
        for row, count in enumerate(counts):
            piece[row, :count] = tokens[row, done[row] : done[row] + count]
        hidden, cache = append(params, cache, piece, jnp.array(counts))
        for row, count in enumerate(counts):
            np.testing.assert_allclose(
                hidden[row, :count],
                expected[row, done[row] : done[row] + count],
                rtol=0,
                atol=1e-5,
            )
        done += counts
    assert done.tolist() == cache.lengths.tolist() == LENGTHS


def test_lowering_lengths_rolls_a_row_back(references: dict, tokens: np.ndarray) -> None:
    config, params = load(references["qwen3"])
    expected = np.asarray(hidden_states(config, params, tokens))
    append = jax.jit(partial(model.forward_cached, config=config, sharded=False))
    cache = model.init_cache(config, batch=3, slots=T, dtype=jnp.float32, layout="BGSH")
    wrong = tokens.copy()
    wrong[:, 5:] = 95 - wrong[:, 5:]
    _, cache = append(params, cache, wrong, jnp.array([T, T, T]))
    cache = cache.replace(lengths=jnp.array([5, 5, 5]))
    hidden, _ = append(params, cache, tokens[:, 5:], jnp.array([T - 5] * 3))
    np.testing.assert_allclose(hidden, expected[:, 5:], rtol=0, atol=1e-5)


def loss_and_grad(config: model.ModelConfig, query_chunk: int, remat: str) -> Any:
    def loss(params: model.Params, tokens: jax.Array) -> jax.Array:
        hidden = model.forward(params, tokens, config=config, query_chunk=query_chunk, remat=remat)
        logprobs = jax.nn.log_softmax(hidden @ model.head(params))
        return -jnp.mean(jnp.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], -1))

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module")
def unchunked(references: dict, tokens: np.ndarray) -> tuple:
    config, params = load(references["qwen3_tied"])
    short = tokens[:, :5]
    return params, short, loss_and_grad(config, 5, "none")(params, short)


@pytest.mark.parametrize(
    ("query_chunk", "remat"), [(1, "none"), (3, "layers"), (20, "projections")]
)
def test_chunking_and_remat_change_no_gradient(
    references: dict, unchunked: tuple, query_chunk: int, remat: str
) -> None:
    params, tokens, (loss, grad) = unchunked
    config = hf.read_config(references["qwen3_tied"].folder)
    other_loss, other_grad = loss_and_grad(config, query_chunk, remat)(params, tokens)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=2e-6), other_grad, grad)


def test_a_span_of_many_chunks_is_one_loop_that_changes_nothing(
    references: dict, tokens: np.ndarray
) -> None:
    config, params = load(references["qwen3_tied"])
    assert tokens.shape[1] > 2 * _SPANS  # several chunks a span, the last one shorter
    loss, grad = loss_and_grad(config, tokens.shape[1], "none")(params, tokens)
    other_loss, other_grad = loss_and_grad(config, 1, "none")(params, tokens)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=2e-6), other_grad, grad)


def test_gradient_matches_torch(references: dict, unchunked: tuple) -> None:
    import torch

    _, tokens, (loss, grad) = unchunked
    network = references["qwen3_tied"].model
    network.zero_grad()
    ids = torch.tensor(tokens)
    expected = network(ids, labels=ids).loss
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    layer = network.model.layers[1]
    grad = jax.tree.map(np.asarray, grad)
    pairs = [
        (grad["embed"], network.model.embed_tokens.weight.grad),
        (grad["layers"]["k_norm"][1], layer.self_attn.k_norm.weight.grad),
        (grad["layers"]["q"][1].reshape(32, -1), layer.self_attn.q_proj.weight.grad.T),
        (grad["layers"]["o"][1].reshape(-1, 32), layer.self_attn.o_proj.weight.grad.T),
        (grad["layers"]["down"][1], layer.mlp.down_proj.weight.grad.T),
    ]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)
    network.zero_grad()


def test_init_scales(references: dict) -> None:
    config = hf.read_config(references["qwen2"].folder)
    init = jax.jit(partial(model.init_params, config, dtype=jnp.float32))
    params = init(jax.random.key(0, impl="rbg"))  # compiles far sooner than the default
    specs = model.param_specs(config)
    for leaf, spec in zip(
        jax.tree.leaves(params), jax.tree.leaves(specs, is_leaf=model.is_spec), strict=True
    ):
        leaf = np.asarray(leaf)
        assert leaf.shape == spec.shape
        if spec.scale:
            assert float(leaf.std()) == pytest.approx(spec.scale, rel=0.1)
        else:
            assert set(np.unique(leaf)) == {float(spec.scale is None)}


def test_bfloat16_follows_float32(references: dict, tokens: np.ndarray) -> None:
    config, params = load(references["qwen3"])
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    hidden = hidden_states(config, low, tokens)
    assert hidden.dtype == jnp.bfloat16
    exact = np.asarray(hidden_states(config, params, tokens))
    error = np.abs(np.asarray(hidden, np.float32) - exact)
    assert np.sqrt((error**2).mean()) < 0.05 * exact.std()
