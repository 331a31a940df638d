"""Low-rank adapters: against the merged model, torch and hand arithmetic; and a run with them."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import FrozenConfigDict
from models import TINY
from numpy.testing import assert_allclose, assert_array_equal
from objectives import SAGE
from passes import dequantized, logits
from settings import read
from updates import KEEPER, random_adapters, teacher_of, train_step

from opd_jax import evaluate, export, hf, model, train
from opd_jax.agent import generate as gen
from opd_jax.agent.generate import Sampling
from opd_jax.config import build, load
from opd_jax.config.models import LoadedModel, load_student
from opd_jax.config.settings import read_settings
from opd_jax.learner.batch import Batch
from opd_jax.learner.objective import Objective
from opd_jax.learner.teacher import Teacher
from opd_jax.learner.train_state import abstract_state, init_state
from opd_jax.losses import NO_TURN
from opd_jax.model import ModelConfig, Params, init_arrays, is_spec, param_specs
from opd_jax.model.int8 import contracted_axes, quantize_params
from opd_jax.model.lora import TARGETS, Lora, lora_specs, merged, specs_like, with_adapters
from opd_jax.model.moe import Experts
from opd_jax.model.projections import CONTRACTED, Int8Weight, LoraWeight, project
from opd_jax.runtime.checkpoint import Checkpoints
from opd_jax.runtime.mesh import make_mesh, param_shardings

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIG = replace(TINY, tied=True)
MIXTURE = replace(CONFIG, experts=Experts(count=4, per_token=2, d_ff=8, normalized=True))
LORA = Lora(rank=3, alpha=6.0, targets=TARGETS, int8=False)
ROWS, LENGTH = 4, 12


@pytest.fixture(scope="module")
def base(random_params: Callable) -> Params:
    """The student's own parameters."""
    return jax.tree.map(jnp.asarray, random_params(CONFIG, seed=0))


@pytest.fixture(scope="module")
def teacher(random_params: Callable) -> Params:
    return jax.tree.map(jnp.asarray, random_params(CONFIG, seed=1))


def untrained(lora: Lora = LORA, config: ModelConfig = CONFIG) -> Params:
    return init_arrays(lora_specs(config, lora), jax.random.key(0), dtype=jnp.float32)


def plain_params(params: Params) -> Params:
    """Parameters that are arrays, those of projections merged."""
    specs = param_specs(CONFIG)["layers"]
    layers = {
        key: merged(weight, contracted=contracted_axes(key, specs[key]))
        if key in CONTRACTED
        else weight
        for key, weight in params["layers"].items()
    }
    return params | {"layers": layers}


def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 32, (ROWS, LENGTH)).astype(np.int32)


def sampled(params: Params) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probabilities of eight samples after four given tokens, as in a rollout."""
    weights = gen.sampling_params(
        params, config=CONFIG, dtype=jnp.float32, gather=True, platform="cpu"
    )
    kv = model.init_cache(CONFIG, batch=ROWS, slots=LENGTH, dtype=jnp.float32)
    kv = gen.extend(weights, kv, tokens()[:, :4], jnp.full(ROWS, 3), config=CONFIG, sharded=False)
    _, out = gen.generate(
        weights,
        kv,
        jnp.asarray(tokens()[:, 3]),
        jnp.full(ROWS, 8),
        jax.random.split(jax.random.key(4), ROWS),
        jnp.array([-1]),
        config=CONFIG,
        sampling=Sampling(temperature=1.0, top_k=0, top_p=1.0),
        chunk=8,
        sharded=False,
    )
    return np.asarray(out.tokens), np.asarray(out.logprobs)


# --- What a projection computes -------------------------------------------------------------------


@pytest.mark.parametrize("key", TARGETS)
def test_a_projection_adds_the_product_through_the_rank(key: str) -> None:
    spec = {"o": "btnh,nhd->btd", "down": "btf,fd->btd", "q": "btd,dnh->btnh"}.get(key)
    spec = spec or ("btd,dgh->btgh" if key in "kv" else "btd,df->btf")
    x_axes, w_axes = spec.split("->")[0].split(",")
    sizes = dict(zip("btdnghf", (2, 3, 16, 4, 2, 8, 24), strict=True))
    rng = np.random.default_rng(0)
    x, weight = (
        rng.normal(size=[sizes[a] for a in axes]).astype(np.float32) for axes in (x_axes, w_axes)
    )
    # One layer of the very shapes that the model has for this projection.
    adapter = jax.tree.map(lambda p: p[0], random_adapters(CONFIG, LORA, scale=0.4)[key])
    got = project(x, LoraWeight(weight, adapter["a"], adapter["b"], 2.0), spec)
    a, b = adapter["a"].reshape(-1, 3).astype(float), adapter["b"].reshape(3, -1).astype(float)
    want = np.einsum(spec, x.astype(float), weight + 2.0 * (a @ b).reshape(weight.shape))
    assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("frozen", ["bfloat16", "int8", "mixture"])
def test_untrained_adapters_change_no_bit(
    base: Params, random_params: Callable, frozen: str
) -> None:
    config, lora, params = CONFIG, LORA, base
    if frozen == "bfloat16":
        params = jax.tree.map(lambda p: p.astype(frozen), base)
    if frozen == "int8":
        params = quantize_params(base, CONFIG)
    if frozen == "mixture":  # only its attention has adapters
        config, lora = MIXTURE, replace(LORA, targets=("q", "v", "o"))
        params = jax.tree.map(jnp.asarray, random_params(MIXTURE, seed=0))
    new = jax.tree.map(lambda p: p.astype(params["embed"].dtype), untrained(lora, config))
    assert all(jnp.any(adapter["a"]) for adapter in new.values())
    want = logits(params, tokens(), config)
    assert_array_equal(logits(with_adapters(params, new, lora), tokens(), config), want)
    trained = with_adapters(params, random_adapters(config, lora, scale=0.3), lora)
    if frozen == "mixture":
        assert np.abs(logits(trained, tokens(), config) - want).max() > 0.1
    if frozen == "int8":
        plain = plain_params(trained)
        assert not any(isinstance(weight, Int8Weight) for weight in plain["layers"].values())
        want = logits(plain, tokens(), config)
        tolerance = 1e-5 * np.abs(want).max()
        assert_allclose(logits(trained, tokens(), config), want, rtol=0, atol=tolerance)


# --- One update -----------------------------------------------------------------------------------

ADAMW = optax.adamw(1e-2)


def batch(sampled_tokens: np.ndarray | None = None, logprobs: np.ndarray | None = None) -> Batch:
    """Eight sampled tokens a row, in two turns, after four given ones."""
    row = tokens()
    if sampled_tokens is not None:
        row[:, 4:] = sampled_tokens
    turn_id = np.tile(np.repeat(np.int32([NO_TURN, 0, 1]), 4), (ROWS, 1))
    scores = np.zeros((ROWS, LENGTH), np.float32)
    if logprobs is not None:
        scores[:, 4:] = logprobs
    verdict = np.array([[0, 1], [2, 3], [2, 0], [1, 2]], np.int32)
    return Batch(row, turn_id, scores, verdict, np.tile(np.int32(range(4, 12)), (ROWS, 1)))


@cache
def step_function(objective: Objective, **options: Any) -> Callable:
    return train_step(CONFIG, objective, **({"lora": LORA} | options))


def reading(teacher: Params, rows: Batch) -> Teacher:
    return teacher_of(CONFIG, teacher, rows)


def test_the_gradient_is_the_merged_models_by_the_chain_rule(base: Params, teacher: Params) -> None:
    adapters = random_adapters(CONFIG, LORA, scale=0.2)
    state = init_state(adapters, KEEPER, seed=0)
    state, metrics = step_function(SAGE)(state, reading(teacher, batch()), batch(), base)
    plain = plain_params(with_adapters(base, adapters, LORA))
    whole = init_state(plain, KEEPER, seed=0)
    whole, want = step_function(SAGE, lora=None)(whole, reading(teacher, batch()), batch())
    assert_allclose(metrics["loss"], want["loss"], rtol=1e-5)
    assert metrics["loss"] > 0.1
    for key, gradient in state.opt_state.trace.items():
        dW = np.asarray(whole.opt_state.trace["layers"][key], np.float64)
        a, b = (np.asarray(adapters[key][name], np.float64) for name in "ab")
        inputs = np.prod(a.shape[1:-1])
        dW = dW.reshape(2, inputs, -1)
        scale = LORA.alpha / LORA.rank
        dA = scale * dW @ b.reshape(2, 3, -1).swapaxes(1, 2)
        dB = scale * a.reshape(2, inputs, 3).swapaxes(1, 2) @ dW
        for got, exact in ((gradient["a"], dA), (gradient["b"], dB)):
            atol = 2e-5 * np.abs(exact).max()
            assert_allclose(got, exact.reshape(got.shape), rtol=0, atol=atol, err_msg=key)


def test_an_update_changes_the_adapters_and_nothing_else(base: Params, teacher: Params) -> None:
    before = jax.device_get((base, teacher))
    start = untrained()
    state = init_state(start, ADAMW, seed=0)
    assert jax.tree.structure(state.params) == jax.tree.structure(start)
    step = step_function(SAGE, optimizer=ADAMW)
    for _ in range(2):  # B is zero at first, and A gets no gradient
        state, _ = step(state, reading(teacher, batch()), batch(), base)
    # They can still be read: the updates did not donate them.
    jax.tree.map(assert_array_equal, jax.device_get((base, teacher)), before)
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(state.params), strict=True):
        assert jnp.abs(new - old).min(axis=None, where=old == 0, initial=1) > 0
        assert jnp.abs(new - old).max() > 1e-3


def test_an_update_needs_what_is_adapted(base: Params, teacher: Params) -> None:
    state = init_state(untrained(), KEEPER, seed=0)
    with pytest.raises(ValueError, match=r"`base` is what `lora` adapts: .* got `base` None"):
        step_function(SAGE)(state, reading(teacher, batch()), batch())
    with pytest.raises(ValueError, match="`base` given, `lora` None"):
        step_function(SAGE, lora=None)(state, reading(teacher, batch()), batch(), base)


def test_what_is_sampled_is_what_the_update_recomputes(base: Params, teacher: Params) -> None:
    own = quantize_params(base, CONFIG)
    adapters = random_adapters(CONFIG, LORA, scale=0.2)
    rows = batch(*sampled(with_adapters(own, adapters, LORA)))
    state = init_state(adapters, KEEPER, seed=0)
    _, metrics = step_function(SAGE)(state, reading(teacher, rows), rows, own)
    assert metrics["sums"].logprob_error < 1e-5
    # Sampling from the base alone would be far off.
    state = init_state(untrained(), KEEPER, seed=0)
    _, metrics = step_function(SAGE)(state, reading(teacher, rows), rows, own)
    assert metrics["sums"].logprob_error > 0.1


# --- Merged ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 96, (3, 19))


def adapted_torch(
    reference: Any, adapters: Params, lora: Lora, tokens_BT: np.ndarray
) -> np.ndarray:
    """Torch's logits with (α / r) · B A x added to the output of each adapted linear layer."""
    import torch

    names = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    hooks = []
    for key, adapter in adapters.items():
        for index, layer in enumerate(reference.model.model.layers):
            linear = layer.get_submodule(names.get(key, f"self_attn.{key}_proj"))
            a = torch.tensor(np.asarray(adapter["a"][index]).reshape(-1, lora.rank))
            b = torch.tensor(np.asarray(adapter["b"][index]).reshape(lora.rank, -1))

            def add(module: Any, given: Any, out: Any, a: Any = a, b: Any = b) -> Any:
                return out + (lora.alpha / lora.rank) * (given[0] @ a @ b)

            hooks.append(linear.register_forward_hook(add))
    try:
        with torch.no_grad():
            return reference.model(torch.tensor(tokens_BT)).logits.numpy()
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("name", "targets"), [("qwen3_tied", TARGETS), ("qwen2", TARGETS), ("llama", ("q", "v"))]
)
def test_adapted_and_merged_logits_are_those_of_torch(
    references: dict,
    tokenizer: Any,
    wide: np.ndarray,
    tmp_path: Path,
    name: str,
    targets: tuple[str, ...],
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    reference = references[name]
    config = hf.read_config(reference.folder)
    params = hf.load_params(reference.folder, config, dtype=jnp.float32)
    lora = Lora(rank=4, alpha=6.0, targets=targets, int8=False)
    adapters = random_adapters(config, lora, scale=0.1)
    want = adapted_torch(reference, adapters, lora, wide)
    assert np.abs(want - adapted_torch(reference, {}, lora, wide)).max() > 0.1
    student = with_adapters(params, adapters, lora)
    assert_allclose(logits(student, wide, config), want, rtol=0, atol=1e-5)

    hf.save_model(tmp_path / "m", student, config, dtype="float32", tokenizer_from=tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    with torch.no_grad():
        merged_logits = theirs(torch.tensor(wide)).logits.numpy()
    assert_allclose(merged_logits, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
def test_export_merges_adapters_and_rounds_once(
    base: Params, tokenizer: Any, tmp_path: Path, int8: bool
) -> None:
    config = replace(CONFIG, vocab_size=len(tokenizer))
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), base)
    low["embed"] = jnp.zeros((config.vocab_size, config.d_model), jnp.bfloat16)
    frozen = quantize_params(low, config) if int8 else low
    adapters = random_adapters(CONFIG, LORA, scale=0.2)
    params = with_adapters(frozen, adapters, LORA)
    hf.save_model(tmp_path / "m", params, config, dtype="bfloat16", tokenizer_from=tokenizer)
    got = hf.load_params(tmp_path / "m", config, dtype=jnp.bfloat16)["layers"]
    for key, adapter in adapters.items():
        a, b = (np.asarray(adapter[name], np.float64) for name in "ab")
        product = a.reshape(2, -1, 3) @ b.reshape(2, 3, -1)
        weight = frozen["layers"][key]
        contracted = contracted_axes(key, param_specs(CONFIG)["layers"][key])
        exact = dequantized(weight, contracted) if int8 else np.asarray(weight, np.float64)
        exact = exact + 2.0 * product.reshape(exact.shape)
        # Half a unit in the last of bfloat16's 8 bits, and the rounding of the float32 sum.
        assert_allclose(np.asarray(got[key], np.float64), exact, rtol=2**-8, atol=1e-7)
    assert_array_equal(got["attn_norm"], low["layers"]["attn_norm"])


# --- Refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "changed", "text"),
    [
        (MIXTURE, {"targets": ("gate",)}, "for q, k, v, o, got 'gate'; its experts cannot"),
        (CONFIG, {"rank": 16}, r"`lora.rank`: .* less than 16, .*`q` \[16, 32\], got 16"),
        (CONFIG, {"rank": 0}, "`lora.rank`: expected 1 or more .* got 0"),
    ],
)
def test_adapters_that_a_model_cannot_have(config: ModelConfig, changed: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        lora_specs(config, replace(LORA, **changed))


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("rank=-1", "`lora.rank`: expected at least 0, got -1"),
        ("alpha=0", "`lora.alpha`: expected at least 1e-09, got 0.0"),
        ("targets=q,head", "`lora.targets`: expected one of q, k, .* got 'head'"),
        ("targets=expert_gate", "`lora.targets`: expected one of q, k, .* got 'expert_gate'"),
        ("targets=q,v,q", r"`lora.targets`: .* each once, got \['q', 'v', 'q'\]"),
        ("targets=", r"`lora.targets`: .* one or more projections, each once, got \[\]"),
        ("int8=true", "`lora.int8` rounds .*`lora.rank` = 0 trains them all"),
    ],
)
def test_mistakes_in_a_config_name_their_field(flag: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read("quickstart", f"lora.{flag}")


def test_a_new_student_has_no_adapters() -> None:
    with pytest.raises(ValueError, match=r"`lora.rank` = 4 .* `student` = 'new'"):
        read("household_pair", "lora.rank=4")


def test_specs_of_a_student_are_those_of_its_arrays(base: Params) -> None:
    params = with_adapters(quantize_params(base, CONFIG), untrained(), LORA)
    specs = specs_like(params, CONFIG)
    assert jax.tree.structure(specs, is_leaf=is_spec) == jax.tree.structure(params)
    pairs = zip(jax.tree.leaves(specs, is_leaf=is_spec), jax.tree.leaves(params), strict=True)
    assert all(spec.shape == array.shape for spec, array in pairs)
    # Factors are sharded like the weight; their rank is replicated.
    mesh = make_mesh(data=1, fsdp=2, tensor=2)
    q = param_shardings(specs, mesh)["layers"]["q"]
    assert q.base.values.spec == P(None, "fsdp", "tensor")
    assert q.a.spec == P(None, "fsdp")
    assert q.b.spec == P(None, None, "tensor")


# --- A run ----------------------------------------------------------------------------------------


@pytest.fixture
def adapting(small: tuple[str, ...]) -> FrozenConfigDict:
    """A run that trains adapters on two devices, and evaluates its student before and after."""
    flags = (
        *small,
        *("--config.lora.rank=4", "--config.lora.targets=q,v,o,gate,down"),
        *("--config.mesh.fsdp=2", "--config.optimizer.learning_rate=0.02"),
        *("--config.train.updates=3", "--config.checkpoint.every=1"),
        *("--config.eval.who=before", "--config.eval.splits=valid_seen"),
    )
    return load("quickstart:runlocal", flags)


def saved(config: FrozenConfigDict, workdir: Path) -> tuple[LoadedModel, Any]:
    """The student as it was loaded, and the state of the newest checkpoint."""
    settings = read_settings(config)
    mesh = make_mesh(**dataclasses.asdict(settings.mesh))
    student = load_student(settings, mesh)
    start = build.initial_params(student, settings, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=settings.checkpoint.keep)
    abstract = abstract_state(start, build.optimizer(settings))
    _, state, _ = checkpoints.restore_latest(abstract)
    checkpoints.close()
    return student, state.replace(rng=jax.random.key_data(state.rng))


@pytest.mark.slow
def test_a_run_trains_adapters_goes_on_and_is_evaluated_and_exported_as_one_model(
    adapting: FrozenConfigDict, tmp_path: Path, wide: np.ndarray
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    workdir = tmp_path / "run"
    train.run(adapting, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert line["logprob_error"] < 1e-5
        assert line["update_norm"] > 0
    student, state = saved(adapting, workdir)
    assert sorted(state.params) == ["down", "gate", "o", "q", "v"]
    assert all(jnp.abs(adapter["b"]).max() > 1e-3 for adapter in state.params.values())
    summary = json.loads((workdir / "summary.json").read_text())["eval"]

    shutil.rmtree(workdir / "checkpoints" / "3")
    train.run(adapting, workdir)
    jax.tree.map(assert_array_equal, saved(adapting, workdir)[1], state)

    assert evaluate.run(adapting, workdir, "model") == {"after": summary["after"]}
    assert export.export(workdir, tmp_path / "model") == 3
    params = with_adapters(student.params, state.params, read_settings(adapting).lora)
    want = logits(params, wide, student.config)
    assert np.abs(want - logits(student.params, wide, student.config)).max() > 0.1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        exported = theirs(torch.tensor(wide)).logits.numpy()
    assert_allclose(exported, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_frozen_student_is_kept_in_what_it_computes_in(adapting: FrozenConfigDict) -> None:
    settings = read_settings(adapting)

    def loaded(**changed: Any) -> Params:
        mesh = make_mesh(**dataclasses.asdict(settings.mesh))
        return load_student(replace(settings, **changed), mesh).params

    lora = settings.lora
    assert loaded(compute_dtype="bfloat16")["embed"].dtype == jnp.bfloat16
    everything = loaded(compute_dtype="bfloat16", lora=replace(lora, rank=0))
    assert everything["embed"].dtype == jnp.float32
    int8 = loaded(lora=replace(lora, int8=True))["layers"]
    assert all(isinstance(int8[key], Int8Weight) for key in TARGETS)
