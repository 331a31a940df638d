"""Means of sums and counts, and the seconds of an update's parts."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.report import keys
from opd_jax.report.metrics import means
from opd_jax.report.stopwatch import Stopwatch


def test_a_sum_is_divided_by_its_count_and_what_was_not_observed_is_missing() -> None:
    values = {
        "rate": 3,
        "loss": jnp.float32(0.1),
        "seen": (jnp.float32(8.0), np.int32(4)),
        "unseen": (0.0, 0),
        "kl": (jnp.array([1.0, 0.0, 4.0]), np.array([2, 0, 1])),
    }
    expected = {"rate": 3.0, "loss": float(np.float32(0.1)), "seen": 2.0, "kl": [0.5, None, 4.0]}
    assert means(values) == expected
    # Divided in float64: float32 would round to 2**24.
    assert means({"tokens": (np.int64(2**24 + 1), 1)}) == {"tokens": 2**24 + 1}
    assert str(means({"entropy": (-0.0, 2)})["entropy"]) == "0.0"


@pytest.mark.parametrize("value", [(np.ones(3), np.ones(2)), (np.ones(3), 1), np.ones((2, 2))])
def test_sum_and_count_must_have_one_shape(value: object) -> None:
    with pytest.raises(ValueError, match="`kl` expects sum and count of one shape"):
        means({"kl": value})


def test_a_part_measured_twice_is_summed_under_its_name() -> None:
    clock = Stopwatch()
    with clock.measure("a"):
        pass
    once = clock.seconds["a"]
    with clock.measure("a"), clock.measure("b"):
        pass
    assert clock.seconds.keys() == {"a", "b"}
    assert clock.seconds["a"] > once > 0


def test_compiling_is_counted_apart_and_once() -> None:
    program, first, second = jax.jit(lambda x: x * 3.25 + 1), Stopwatch(), Stopwatch()
    with first.measure("part"):
        program(np.ones(5))
    with second.measure("part"):
        program(np.ones(5))
    assert first.compile_s > 0 == second.compile_s


def test_tracing_counts_as_compiling_and_a_call_in_it_only_once() -> None:
    @jax.jit
    def inner(x: jax.Array) -> jax.Array:
        time.sleep(0.2)
        return x + 1

    @jax.jit
    def outer(x: jax.Array) -> jax.Array:
        time.sleep(0.2)
        return inner(x) * 2

    clock, start = Stopwatch(), time.perf_counter()
    with clock.measure("part"):
        outer(np.ones(3))
    assert 0.39 < clock.compile_s < time.perf_counter() - start


# --- The table of keys


def test_a_name_is_defined_if_a_row_of_the_table_has_it() -> None:
    assert keys.expanded("a/{b,c}_{d,} e") == ["a/b_d", "a/b_", "a/c_d", "a/c_", "e"]
    for name in ("loss", "by_turn/strong", "tokens/seen", "end/gave_up", "judge/unparsable"):
        assert keys.defined(name)
    for name in ("los", "losses", "by_turn/loss", "tokens/", "end/", "seconds/lunch", "end/a/b"):
        assert not keys.defined(name)


def test_no_two_rows_define_the_same_name() -> None:
    names = [name for key in keys.KEYS for name in keys.expanded(key.names)]
    assert len(names) == len(set(names))
