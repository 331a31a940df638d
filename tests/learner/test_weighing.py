"""What a method may read, which settings it takes, and what is said of one that does not fit."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import SAGE

from opd_jax.learner import weights
from opd_jax.learner.weighing import WEIGHT_SETTINGS, Weight
from opd_jax.losses import NO_TURN

WEIGHT = SAGE.weight
TURN_ID = jnp.array([[0, 0, 1, NO_TURN], [0, 1, 1, 1]])


def by(name: str, **settings: Any) -> Weight:
    return replace(WEIGHT, by=name, **settings)


def mine(name: str, **options: Any) -> Weight:
    return by(f"test_weighing:{name}", options=tuple(options.items()))


def of_turns(turn_id: jax.Array, *, reliability: jax.Array) -> jax.Array:
    return reliability


def signed(turn_id: jax.Array, *, divergence: jax.Array, power: int = 1) -> jax.Array:
    return divergence**power


def of_row(turn_id: jax.Array, *, teacher_entropy: jax.Array) -> jax.Array:
    return jnp.broadcast_to(teacher_entropy.sum(axis=1, keepdims=True), turn_id.shape)


def reads_nothing_known(turn_id: jax.Array, *, rewards: jax.Array) -> jax.Array:
    return rewards


def test_a_signature_says_what_has_to_be_computed() -> None:
    reads = {
        name: (w.labels, w.reads_teacher, w.reads_student)
        for name in weights.METHODS
        if (w := by(name))
    }
    nothing = (), False, False
    from_teacher = (), True, False
    assert reads == {
        "uniform": nothing,
        "sage": (("verdict",), True, False),
        "intervention": (("verdict",), False, False),
        "confidence": from_teacher,
        "reliability": (("reliability",), False, False),
        "entropy_aware": from_teacher,
        "sod": from_teacher,
        "iw_opd": from_teacher,
        "return_to_go": from_teacher,
    }
    assert mine("signed").reads_student


def test_every_setting_is_taken_by_a_method_and_else_read_by_none() -> None:
    takes = {s: [n for n in weights.METHODS if by(n).takes(s)] for s in WEIGHT_SETTINGS}
    assert all(takes.values())
    assert takes["fail_weight"] == ["sage", "intervention"]
    assert takes["confidence_temperature"] == ["sage", "confidence"]


def test_padding_reaches_neither_weights_nor_their_totals() -> None:
    poisoned = jnp.where(TURN_ID == NO_TURN, jnp.nan, -1.0)
    clean = jnp.full(TURN_ID.shape, -1.0)
    arrays = ("sampled_logprobs", "teacher_logprob", "teacher_top1_prob", "teacher_entropy")
    labels = dict(verdict=jnp.array([[1, 2], [3, 2]]), reliability=jnp.ones((2, 2)), num_turns=2)
    for name in weights.METHODS:
        got, want = (
            by(name)(TURN_ID, **dict.fromkeys(arrays, x), **labels) for x in (poisoned, clean)
        )
        np.testing.assert_array_equal(got, want, err_msg=name)
        assert got[0, 3] == 0
        assert jnp.isfinite(got).all()


def test_a_function_that_adds_up_a_row_meets_no_padding() -> None:
    entropy = jnp.where(TURN_ID == NO_TURN, jnp.nan, 2.0)
    s = mine("of_row")(TURN_ID, teacher_entropy=entropy)
    np.testing.assert_array_equal(s, [[6, 6, 6, 0], [8, 8, 8, 8]])


def test_weights_have_no_gradient() -> None:
    def total(divergence: jax.Array) -> jax.Array:
        return mine("signed", power=2)(TURN_ID, divergence=divergence).sum()

    assert total(jnp.full(TURN_ID.shape, 3.0)) == 7 * 9
    assert not jax.grad(total)(jnp.full(TURN_ID.shape, 3.0)).any()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda: mine("TURN_ID"), "`weight.by` = .*:TURN_ID': expected a function of .turn_id"),
        (lambda: by("sago"), "`weight.by`: expected one of uniform, sage, .* got 'sago'"),
        (lambda: mine("signed", pow=2), "`weight.pow` is none of its fields; it takes .*power"),
        (lambda: mine("reads_nothing_known"), "`weight.rewards` is missing"),
        (lambda: by("sage", weak_weight=-0.1), "`weak_weight`: expected 0..1, got -0.1"),
        (lambda: by("sage", skip_weight=1.1), "`skip_weight`: expected 0..1, got 1.1"),
        (lambda: by("sage", fail_weight=-0.1), "`fail_weight`: expected 0..1, got -0.1"),
        (lambda: by("sod", discrepancy_eps=0.0), "`discrepancy_eps`: expected .* got 0.0"),
        (lambda: by("uniform", entropy_bonus=-1.0), "`entropy_bonus`: expected .* got -1.0"),
        (lambda: by("uniform", confidence_temperature=-1.0), "`confidence_temperature`: .* -1.0"),
    ],
)
def test_a_weight_that_does_not_fit_is_named(weight: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weight()


def test_a_label_that_the_batch_lacks_is_named() -> None:
    with pytest.raises(ValueError, match=r"'reliability' reads `reliability`.*`Batch.labels`"):
        by("reliability")(TURN_ID, verdict=jnp.ones((2, 2), int))


def test_weights_of_turns_are_not_taken_for_those_of_tokens() -> None:
    with pytest.raises(ValueError, match=r"`weight.by` = .* \(2, 4\), got \(2, 2\).*of_each_token"):
        mine("of_turns")(TURN_ID, reliability=jnp.ones((2, 2)))


def test_the_function_on_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "on_the_page.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    hesitant = by("on_the_page:hesitant", options=(("most", 3.0),))
    assert hesitant.reads == {"verdict", "teacher_entropy", "num_turns"}
    s = hesitant(
        TURN_ID,
        verdict=jnp.array([[1, 0], [2, 3]]),
        teacher_entropy=jnp.array([[0.0, 1.0, 9.0, 9.0], [2.0, 0.0, 0.0, 3.0]]),
        num_turns=2,
    )
    np.testing.assert_allclose(s, [[2.0, 2.0, 0.0, 0.0], [1.0, 1.5, 1.5, 1.5]])


def test_the_page_and_the_configs_name_every_method() -> None:
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text("utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(weights.METHODS)
