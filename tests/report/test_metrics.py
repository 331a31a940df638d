"""Sums and counts, and the seconds of an update's parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.report.metrics import Metrics, Stopwatch


def test_the_mean_over_any_split_is_the_mean_over_everything():
    rng = np.random.default_rng(0)
    values = rng.normal(size=100)
    metrics = Metrics()
    for part in np.split(values, [3, 40, 41]):
        metrics.add({"loss": (part.sum(), len(part))})
    assert metrics.means()["loss"] == pytest.approx(values.mean(), rel=1e-12)


def test_scalars_are_averaged_and_unobserved_ones_left_out():
    metrics = Metrics()
    metrics.add({"rate": 1.0, "seen": (3, 2), "unseen": (0.0, 0)})
    metrics.add({"rate": 3, "seen": (jnp.float32(5.0), jnp.int32(2))})
    assert metrics.means() == {"rate": 2.0, "seen": 2.0}


def test_a_metric_by_turn_has_null_where_no_turn_was_seen():
    metrics = Metrics()
    metrics.add({"kl": (jnp.array([1.0, 0.0, 4.0]), jnp.array([2, 0, 1]))})
    metrics.add({"kl": (np.array([1.0, 0.0, 0.0]), np.array([2, 0, 0]))})
    assert metrics.means() == {"kl": [0.5, None, 4.0]}


def test_a_metric_keeps_its_shape():
    metrics = Metrics()
    with pytest.raises(ValueError, match="`kl`"):
        metrics.add({"kl": (np.ones(3), np.ones(2))})
    metrics.add({"kl": (np.ones(3), np.ones(3))})
    with pytest.raises(ValueError, match="`kl`"):
        metrics.add({"kl": (np.ones(2), np.ones(2))})
    assert metrics.means() == {"kl": [1.0, 1.0, 1.0]}


# --- Stopwatch


def test_a_part_measured_twice_is_summed_under_its_name():
    clock = Stopwatch()
    with clock.measure("a"):
        pass
    once = clock.seconds["a"]
    with clock.measure("a"), clock.measure("b"):
        pass
    assert clock.seconds.keys() == {"a", "b"}
    assert clock.seconds["a"] > once > 0


def test_compiling_is_counted_apart_and_once():
    program, clock = jax.jit(lambda x: x * 3.25 + 1), Stopwatch()
    with clock.measure("first"):
        program(np.ones(5))
    assert clock.compile_s > 0
    again = Stopwatch()
    with again.measure("second"):
        program(np.ones(5))
    assert again.compile_s == 0
