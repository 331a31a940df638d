"""The model against `transformers`, and its two passes against each other."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from passes import cached_logits, logits

from opd_jax import hf, model
from opd_jax.model.attention import _SPANS
from opd_jax.model.transformer import rope_frequencies

pytestmark = pytest.mark.usefixtures("compile_quickly")

LENGTHS = [19, 11, 4]  # right-padded rows
T = max(LENGTHS)
REAL = np.arange(T) < np.array(LENGTHS)[:, None]


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 96, (len(LENGTHS), T))


def load(reference: Any) -> tuple[model.ModelConfig, model.Params]:
    config = hf.read_config(reference.folder)
    return config, hf.load_params(reference.folder, config, dtype=jnp.float32)


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_tied", "qwen2", "llama", "qwen3_moe", "qwen3_moe_shares"]
)
def test_logits_and_parameters_are_those_of_transformers(
    references: dict, tokens: np.ndarray, name: str
) -> None:
    import torch

    reference = references[name]
    config, params = load(reference)
    assert sum(x.size for x in jax.tree.leaves(params)) == reference.model.num_parameters()
    specs = model.param_specs(config)
    shapes = jax.tree.map(lambda spec: spec.shape, specs, is_leaf=model.is_spec)
    assert jax.tree.map(lambda x: x.shape, params) == shapes
    with torch.no_grad():
        mask = torch.tensor(REAL).long()
        expected = reference.model(torch.tensor(tokens), attention_mask=mask).logits.numpy()
    assert np.abs(expected).max() > 1  # else 1e-5 would say little
    got = logits(params, tokens, config)
    np.testing.assert_allclose(got[REAL], expected[REAL], rtol=0, atol=1e-5)


def test_rope_frequencies_are_those_of_transformers(references: dict) -> None:
    for name in ("qwen3", "llama"):
        config = hf.read_config(references[name].folder)
        expected = references[name].model.model.rotary_emb.inv_freq.numpy()
        np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-6)
    # Llama's scaling keeps some frequencies, divides some, and interpolates some.
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    ratio, factor = plain / rope_frequencies(config), config.rope_scaling.factor
    assert ratio.min() == 1
    assert ratio.max() == pytest.approx(factor)
    assert ((ratio > 1.01) & (ratio < 0.99 * factor)).any()


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "qwen3_moe"])
def test_ragged_pieces_over_a_cache_equal_one_forward(
    references: dict, tokens: np.ndarray, name: str
) -> None:
    config, params = load(references[name])
    pieces = [[7, 0, 3], [5, 7, 1], [0, 4, 0], [7, 0, 0]]  # a row may pause
    assert np.sum(pieces, axis=0).tolist() == LENGTHS
    got = cached_logits(params, tokens, config, pieces=pieces)
    want = logits(params, tokens, config)
    np.testing.assert_allclose(got[REAL], want[REAL], rtol=0, atol=1e-5)


def test_lowering_lengths_rolls_a_row_back(references: dict, tokens: np.ndarray) -> None:
    config, params = load(references["qwen3"])
    append = jax.jit(partial(model.forward_cached, config=config, sharded=False))
    cache = model.init_cache(config, batch=3, slots=T, dtype=jnp.float32)
    wrong = tokens.copy()
    wrong[:, 5:] = 95 - wrong[:, 5:]
    _, cache = append(params, cache, wrong, jnp.array([T, T, T]))
    cache = cache.replace(lengths=jnp.array([5, 5, 5]))
    hidden, _ = append(params, cache, tokens[:, 5:], jnp.array([T - 5] * 3))
    got, want = hidden @ model.head(params), logits(params, tokens, config)
    np.testing.assert_allclose(got, want[:, 5:], rtol=0, atol=1e-5)


# --- Gradients


def loss_and_grad(config: model.ModelConfig, query_chunk: int, remat: str) -> Any:
    def loss(params: model.Params, tokens: jax.Array) -> jax.Array:
        hidden = model.forward(params, tokens, config=config, query_chunk=query_chunk, remat=remat)
        logprobs = jax.nn.log_softmax(hidden @ model.head(params))
        return -jnp.mean(jnp.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], -1))

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module")
def unchunked(references: dict, tokens: np.ndarray) -> tuple:
    config, params = load(references["qwen3_tied"])
    return config, params, loss_and_grad(config, T, "none")(params, tokens)


@pytest.mark.parametrize(("query_chunk", "remat"), [(1, "layers"), (5, "projections")])
def test_chunking_and_remat_change_no_gradient(
    unchunked: tuple, tokens: np.ndarray, query_chunk: int, remat: str
) -> None:
    assert T > 2 * _SPANS  # with one query a chunk, a span has several chunks
    config, params, (loss, grad) = unchunked
    other_loss, other_grad = loss_and_grad(config, query_chunk, remat)(params, tokens)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=2e-6), other_grad, grad)


def test_the_gradient_is_that_of_torch(
    references: dict, unchunked: tuple, tokens: np.ndarray
) -> None:
    import torch

    _, _, (loss, grad) = unchunked
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


# --- Initialization and dtypes


def test_parameters_start_with_the_scales_of_their_specs(references: dict) -> None:
    config = hf.read_config(references["qwen2"].folder)
    init = jax.jit(partial(model.init_params, config, dtype=jnp.float32))
    params = init(jax.random.key(0, impl="rbg"))  # compiles far sooner than the default
    specs = jax.tree.leaves(model.param_specs(config), is_leaf=model.is_spec)
    for leaf, spec in zip(jax.tree.leaves(params), specs, strict=True):
        leaf = np.asarray(leaf)
        assert leaf.shape == spec.shape
        if spec.scale:
            assert float(leaf.std()) == pytest.approx(spec.scale, rel=0.1)
        else:
            assert set(np.unique(leaf)) == {float(spec.scale is None)}


def test_bfloat16_follows_float32(references: dict, tokens: np.ndarray) -> None:
    config, params = load(references["qwen3"])
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    forward = jax.jit(partial(model.forward, config=config, query_chunk=8, remat="none"))
    hidden, exact = forward(low, tokens), np.asarray(forward(params, tokens))
    assert hidden.dtype == jnp.bfloat16
    error = np.abs(np.asarray(hidden, np.float32) - exact)
    assert np.sqrt((error**2).mean()) < 0.05 * exact.std()
