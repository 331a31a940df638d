"""AdamW behind a clip, its schedules, and where the state of an update lives."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_batch import CONFIG, STUDENT

from opd_jax.learner.optimizer import AdamW, make_optimizer
from opd_jax.learner.train_state import abstract_state, init_state
from opd_jax.model import is_spec, param_specs
from opd_jax.runtime.mesh import make_mesh, param_shardings

pytestmark = pytest.mark.usefixtures("compile_quickly")

PLAIN = AdamW(
    learning_rate=1.0,
    schedule="constant",
    warmup_updates=0,
    weight_decay=0.0,
    b1=0.9,
    b2=0.95,
    eps=1e-30,
    clip_norm=0.0,
)
ADAMW = make_optimizer(replace(PLAIN, weight_decay=0.1, clip_norm=1.0), total_updates=10)


def rates(updates: int, **settings) -> list[float]:
    """The rate of each update: how far Adam moves where the gradient is always the same."""
    optimizer = make_optimizer(replace(PLAIN, **settings), total_updates=10)
    weight = {"w": jnp.ones(())}
    state = optimizer.init(weight)
    moved = []
    for _ in range(updates):
        change, state = optimizer.update(weight, state, weight)
        moved.append(-float(change["w"]))
    return moved


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("constant", [1.0] * 8),
        # 0 after the last of ten updates.
        ("linear", [1 - k / 7 for k in range(8)]),
        ("cosine", [(1 + np.cos(np.pi * k / 7)) / 2 for k in range(8)]),
    ],
)
def test_the_rate_rises_for_the_warm_up_and_then_falls(schedule: str, after: list[float]) -> None:
    got = rates(11, schedule=schedule, warmup_updates=3)
    # The fourth update has the peak rate. The first has a rate above 0.
    np.testing.assert_allclose(got, [0.25, 0.5, 0.75, *after], rtol=1e-5, atol=1e-7)


def test_without_a_warm_up_the_first_update_has_the_peak_rate() -> None:
    np.testing.assert_allclose(rates(2, learning_rate=0.5), [0.5, 0.5], rtol=1e-5)
    assert rates(1, warmup_updates=50)[0] > 0  # longer than the run


def test_weight_decay_spares_norms_and_biases() -> None:
    optimizer = make_optimizer(replace(PLAIN, weight_decay=0.1, eps=1e-8), total_updates=10)
    specs = param_specs(replace(CONFIG, qk_norm=True, qkv_bias=True))
    params = jax.tree.map(lambda _: jnp.array([1.0, -2.0]), specs, is_leaf=is_spec)
    still = jax.tree.map(jnp.zeros_like, params)
    change, _ = optimizer.update(still, optimizer.init(params), params)
    decayed = {"embed", "head", "q", "k", "v", "o", "gate", "up", "down"}
    spared = {"attn_norm", "mlp_norm", "q_norm", "k_norm", "final_norm"}
    spared |= {"q_bias", "k_bias", "v_bias"}
    # Without a gradient only the decay is left: -rate · decay · parameter.
    moved = {path[-1].key: x.tolist() for path, x in jax.tree_util.tree_leaves_with_path(change)}
    assert {name for name, x in moved.items() if x == pytest.approx([-0.1, 0.2])} == decayed
    assert {name for name, x in moved.items() if x == [0, 0]} == spared
    assert moved.keys() == decayed | spared


@pytest.mark.parametrize(
    ("clip_norm", "clipped"), [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0]), (0.0, [3.0, 4.0])]
)
def test_the_gradient_is_clipped_by_its_global_norm(clip_norm: float, clipped: list) -> None:
    gradient = {"a": jnp.float32(3), "b": jnp.float32(4)}
    # With eps = 1 the first update, -g / (|g| + 1), shows the size of g.
    optimizer = make_optimizer(replace(PLAIN, eps=1.0, clip_norm=clip_norm), total_updates=10)
    change, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    want = [-g / (g + 1) for g in clipped]
    np.testing.assert_allclose([change["a"], change["b"]], want, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1e-3),
        ("learning_rate", float("inf")),
        ("schedule", "step"),
        ("warmup_updates", -1),
        ("weight_decay", -0.1),
        ("b1", 1.0),
        ("b2", -0.1),
        ("eps", 0.0),
        ("clip_norm", -1.0),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: float | str) -> None:
    with pytest.raises(ValueError, match=f"^`{name}`: expected .* got .*{value}"):
        replace(PLAIN, **{name: value})


# --- The state ----------------------------------------------------------------------------------


def test_moments_are_sharded_as_their_parameters_and_counters_are_replicated() -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings = param_shardings(param_specs(CONFIG), mesh)
    state = init_state(jax.device_put(STUDENT(), shardings), ADAMW, seed=0)
    ((_, moments),) = optax.tree_utils.tree_get_all_with_path(state.opt_state, "mu")
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), moments, shardings)
    assert all(jax.tree.leaves(same))
    ((_, count), *_) = optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")
    for scalar in (state.step, state.rng, count):
        assert scalar.is_fully_replicated
        assert scalar.devices() == set(mesh.devices.flat)


def test_the_abstract_state_describes_the_initial_state_and_allocates_nothing() -> None:
    state = init_state(STUDENT(), ADAMW, seed=0)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STUDENT()
    )
    for abstract in (abstract_state(STUDENT(), ADAMW), abstract_state(shapes, ADAMW)):
        assert jax.tree.structure(state) == jax.tree.structure(abstract)
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
            assert isinstance(y, jax.ShapeDtypeStruct)
            assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)
    assert state.step == 0
    assert jnp.array_equal(jax.random.key_data(state.rng), jax.random.key_data(jax.random.key(0)))
