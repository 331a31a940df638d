"""One update: against a float64 reference, over splits, devices and padding, and its optimizer."""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import TINY
from objectives import OPD, SAGE, SFT
from scipy.special import log_softmax, rel_entr
from scipy.stats import entropy

from opd_jax import model
from opd_jax.agent.conversation import Trajectory
from opd_jax.learner.batch import Batch, make_batch, split
from opd_jax.learner.objective import Objective, objective_sums, score
from opd_jax.learner.optimizer import make_optimizer
from opd_jax.learner.train_state import TrainState, abstract_state, init_state, placement_of
from opd_jax.learner.train_step import make_train_step
from opd_jax.losses import NO_TURN, TokenScores, Verdict
from opd_jax.model import ModelConfig, Params, init_params, is_spec, param_specs
from opd_jax.runtime.mesh import make_mesh, param_shardings, shard_batch

SKIP, WEAK, STRONG, DET_FAIL = (int(v) for v in Verdict)

CONFIG = replace(TINY, d_ff=32, qk_norm=False)

BY_TRAJECTORY = replace(SAGE, scope="trajectory")
THRESHOLD = 2.88  # nats; about half of the tokens' entropies lie above

# A character a token: a digit for the turn that sampled it, a dot for a given token, an underscore
# for padding. Rows differ in length and in weight, so a normalizer over a part shows.
ROWS = ["..000.11..22", ".0.1____", "..00.111___", ".0.1.22222__"]
VERDICT = np.array(
    [
        [WEAK, STRONG, SKIP],
        [SKIP, DET_FAIL, STRONG],  # has no third turn: its verdict is never looked at
        [STRONG, WEAK, SKIP],
        [SKIP, WEAK, STRONG],
    ],
    np.int32,
)
K = 3

# The same float32 sums in another order: a few units in the last place (6e-8) at each of the two
# layers and in their gradients, relative to the largest entry of a parameter's gradient.
ROUNDING = 5e-6


pytestmark = pytest.mark.usefixtures("compile_quickly")


def trajectory(rows: list[str] = ROWS, width: int = 12) -> Trajectory:
    rng = np.random.default_rng(0)
    turn_id = np.full((len(rows), width), NO_TURN, np.int32)
    for row, text in enumerate(rows):
        turn_id[row, : len(text)] = [int(c) if c.isdigit() else NO_TURN for c in text]
    lengths = np.array([len(text.rstrip("_")) for text in rows], np.int32)
    # Drawn at a fixed width, so that a longer bucket holds the same tokens.
    tokens = np.pad(rng.integers(1, 32, (len(rows), 12)), [(0, 0), (0, width - 12)])
    tokens[np.arange(width) >= lengths[:, None]] = 0
    return Trajectory(
        tokens=tokens.astype(np.int32),
        turn_id=turn_id,
        sampled_logprobs=np.where(turn_id == NO_TURN, 0, -1.5).astype(np.float32),
        lengths=lengths,
        num_turns=turn_id.max(axis=1) + 1,
        failed=VERDICT == DET_FAIL,
        success=np.zeros(len(rows), bool),
        score=np.zeros(len(rows), np.float32),
    )


def standard_batch() -> Batch:
    return make_batch(trajectory(), VERDICT, response_multiple=8)


@cache
def params(seed: int, config: ModelConfig = CONFIG) -> Params:
    """Random parameters with no norm at one and no bias at zero; logits far from uniform."""
    made = init_params(config, jax.random.key(seed), dtype=jnp.float32)
    leaves, treedef = jax.tree.flatten(made)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        treedef, [x + 0.2 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    )


STUDENT, TEACHER = partial(params, 1), partial(params, 2)

# Its state is the gradient itself, and a step of -1 times it the update.
GRADIENT_KEEPER = optax.chain(optax.trace(decay=0.0), optax.scale(-1.0))
ADAMW = make_optimizer(
    learning_rate=1e-2,
    schedule="constant",
    warmup_updates=0,
    total_updates=10,
    weight_decay=0.1,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    clip_norm=1.0,
)


@cache
def step_function(
    objective: Objective,
    *,
    micro_batches: int = 1,
    batch_rows: int | None = None,
    remat: str = "none",
    placement: TrainState | None = None,
):
    """Compiled once for all tests that share its settings."""
    return make_train_step(
        student=CONFIG,
        teacher=CONFIG if objective.needs_teacher else None,
        objective=objective,
        optimizer=GRADIENT_KEEPER,
        placement=placement,
        micro_batches=micro_batches,
        batch_rows=batch_rows,
        dtype=jnp.dtype("float32"),
        query_chunk=16,
        loss_chunk=8,
        remat=remat,
    )


@dataclass(frozen=True)
class Updated:
    """What one update did, on the host."""

    params: Params
    gradient: Params
    metrics: dict[str, Any]


def update(objective: Objective, batch: Batch | None = None, **settings: Any) -> Updated:
    state = init_state(STUDENT(), GRADIENT_KEEPER, seed=0)
    teacher = TEACHER() if objective.needs_teacher else None
    batch = standard_batch() if batch is None else batch
    state, metrics = step_function(objective, **settings)(state, teacher, batch)
    state, metrics = jax.device_get((state, metrics))
    return Updated(state.params, state.opt_state[0].trace, metrics)


def assert_same_tree(got: Params, want: Params, *, rounding: float = ROUNDING) -> None:
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        name = jax.tree_util.keystr(path)
        atol = rounding * np.max(np.abs(y))
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=name)


def assert_same_update(got: Updated, want: Updated) -> None:
    assert_same_tree(got.gradient, want.gradient)
    for name in ("loss", "z", "grad_norm"):
        np.testing.assert_allclose(got.metrics[name], want.metrics[name], rtol=ROUNDING)
    for name, value in vars(want.metrics["sums"]).items():
        mine = getattr(got.metrics["sums"], name)
        np.testing.assert_allclose(mine, value, rtol=1e-5, err_msg=name)


# --- A reference in float64, token by token -------------------------------------------------------


@cache
def reference_logprobs(who: int) -> np.ndarray:
    """[B, T, V] in float64: entry t is about token t, so position 0 is empty."""
    hidden = model.forward(
        params(who), standard_batch().tokens, config=CONFIG, query_chunk=16, remat="none"
    )
    scores = np.asarray(hidden, np.float64) @ np.asarray(params(who)["head"], np.float64)
    return np.roll(log_softmax(scores, axis=-1), 1, axis=1)


TOKENS = sum(c.isdigit() for row in ROWS for c in row)


def student_tokens(row: int) -> list[tuple[int, int]]:
    return [(t, int(c)) for t, c in enumerate(ROWS[row]) if c.isdigit()]


def reference_scores() -> tuple[np.ndarray, np.ndarray]:
    """(reverse KL [B, T], confidence [B, K]) by loops."""
    p_s, p_t = np.exp(reference_logprobs(1)), np.exp(reference_logprobs(2))
    kl = rel_entr(p_s, p_t).sum(-1)
    confidence = np.zeros((len(ROWS), K))
    for row in range(len(ROWS)):
        for k in {k for _, k in student_tokens(row)}:
            tokens = [t for t, turn in student_tokens(row) if turn == k]
            confidence[row, k] = np.mean([p_t[row, t].max() for t in tokens])
    return kl, confidence


def reference_weights(objective: Objective) -> tuple[np.ndarray, float | None]:
    """(weight [B, T], z over the batch or None)."""
    _, confidence = reference_scores()
    i = {SKIP: 0.0, WEAK: objective.weak_weight, STRONG: 1.0, DET_FAIL: 1.0}
    s = np.zeros((len(ROWS), 12))
    student = np.zeros((len(ROWS), 12), bool)
    for row in range(len(ROWS)):
        for t, k in student_tokens(row):
            student[row, t] = True
            s[row, t] = (i[int(VERDICT[row, k])] if objective.intervention else 1.0) * (
                confidence[row, k] if objective.confidence else 1.0
            )
    p_t = reference_logprobs(2)
    uncertain = entropy(np.exp(p_t), axis=-1) > objective.entropy_threshold
    s *= 1 + objective.entropy_bonus * uncertain
    count = s > 0 if objective.normalize == "active_tokens" else student
    if objective.normalize == "none":
        return s, 1.0
    if objective.scope == "trajectory":
        return s * (count.sum(1) / s.sum(1))[:, None], None
    z = count.sum() / s.sum()
    z = z if objective.max_z is None else min(z, objective.max_z)
    return s * z, z


OBJECTIVES = {
    "sage": SAGE,
    "opd": OPD,
    "without_confidence": replace(SAGE, confidence=False),
    "without_intervention": replace(SAGE, intervention=False),
    "without_normalizer": replace(SAGE, normalize="none"),
    "active_tokens": replace(SAGE, normalize="active_tokens"),
    "max_z": replace(SAGE, max_z=1.25),
    "by_trajectory": BY_TRAJECTORY,
    "entropy_aware": replace(OPD, entropy_bonus=1.0, entropy_threshold=THRESHOLD),
    "sage_entropy_aware": replace(SAGE, entropy_bonus=0.5, entropy_threshold=THRESHOLD),
    "entropy_aware_by_trajectory": replace(
        BY_TRAJECTORY, entropy_bonus=0.5, entropy_threshold=THRESHOLD
    ),
}


@cache
def scores_of() -> TokenScores:
    return jax.jit(
        partial(
            score,
            student=CONFIG,
            teacher=CONFIG,
            objective=SAGE,
            dtype=jnp.dtype("float32"),
            query_chunk=16,
            loss_chunk=8,
            remat="none",
        )
    )(STUDENT(), TEACHER(), standard_batch())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_weighted_sum_of_each_objective_equals_float64(name: str) -> None:
    objective = OBJECTIVES[name]
    kl, _ = reference_scores()
    weight, z = reference_weights(objective)
    sums = objective_sums(scores_of(), standard_batch(), objective=objective)
    z = 1.0 if z is None else z  # a trajectory's own is part of the sums already
    np.testing.assert_allclose(sums.loss * z, (weight * kl).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.weight * z, weight.sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.active, np.sum(weight > 0))


def test_the_threshold_of_the_teacher_s_entropy_splits_the_tokens() -> None:
    uncertain = entropy(np.exp(reference_logprobs(2)), axis=-1) > THRESHOLD
    share = np.mean([uncertain[row, t] for row in range(len(ROWS)) for t, _ in student_tokens(row)])
    assert 0.2 < share < 0.8


@pytest.mark.parametrize("objective", [OPD, SAGE, BY_TRAJECTORY])
def test_a_factor_that_no_token_reaches_is_bit_for_bit_none(objective: Objective) -> None:
    above_all = replace(objective, entropy_bonus=1.0, entropy_threshold=np.log(32) + 1)
    batch = standard_batch()
    for got, want in zip(
        jax.tree.leaves(objective_sums(scores_of(), batch, objective=above_all)),
        jax.tree.leaves(objective_sums(scores_of(), batch, objective=objective)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("objective", [SAGE, BY_TRAJECTORY], ids=["batch", "trajectory"])
def test_loss_of_an_update_equals_float64(objective: Objective) -> None:
    kl, _ = reference_scores()
    weight, z = reference_weights(objective)
    got = update(objective).metrics
    np.testing.assert_allclose(got["loss"], (weight * kl).sum() / TOKENS, rtol=1e-5)
    np.testing.assert_allclose(got["z"], 1.0 if z is None else z, rtol=1e-5)


def test_settings_of_the_normalizer_reach_the_update() -> None:
    objective = replace(SAGE, confidence=False, normalize="active_tokens", eps=4.0, max_z=1.75)
    skip = np.full((4, K), SKIP, np.int32)
    some, few, one = (skip.copy() for _ in range(3))
    some[2], few[0, 0], one[1, 0] = [STRONG, WEAK, SKIP], STRONG, WEAK
    # Row 2: two STRONG tokens, three WEAK: 5 / 3.5 would be it, but ε = 4 holds: 5 / 4.
    # Row 0 on its own, turn 0 STRONG: 3 tokens over max(3, 4). Row 1, one WEAK token: 1 / 4.
    for verdict, z in ((some, 5 / 4), (few, 3 / 4), (one, 1 / 4)):
        got = update(objective, standard_batch().replace(verdict=verdict)).metrics
        np.testing.assert_allclose(got["z"], z, rtol=1e-6)
    # All WEAK: z would be 21 / 10.5 = 2.
    weak = update(objective, standard_batch().replace(verdict=np.full_like(skip, WEAK))).metrics
    np.testing.assert_allclose(weak["z"], 1.75, rtol=1e-6)
    # Half-weighted tokens, 1.75 times: 1.75 / 2 of plain OPD's loss.
    kl, _ = reference_scores()
    student = np.array([[c.isdigit() for c in row.ljust(12, "_")] for row in ROWS])
    np.testing.assert_allclose(weak["loss"], kl[student].mean() * 1.75 / 2, rtol=1e-5)


def test_ablations_are_different_objectives() -> None:
    weights = [reference_weights(o)[0].tobytes() for o in OBJECTIVES.values()]
    assert len(set(weights)) == len(weights)


@cache
def unfused_gradient(objective: Objective) -> Params:
    """The gradient of Σ w·d / N written out over all of [B, T, V], with the weights of loops."""
    return _unfused_gradient(STUDENT(), reference_weights(objective)[0].astype(np.float32))


@jax.jit
@jax.grad
def _unfused_gradient(student: Params, weight: jax.Array) -> jax.Array:
    tokens, log_t = standard_batch().tokens, reference_logprobs(2).astype(np.float32)
    hidden = model.forward(student, tokens, config=CONFIG, query_chunk=16, remat="none")
    log_s = jnp.roll(jax.nn.log_softmax(hidden @ student["head"]), 1, axis=1)
    return jnp.sum(weight[..., None] * jnp.exp(log_s) * (log_s - log_t)) / TOKENS


@pytest.mark.parametrize("objective", [SAGE, BY_TRAJECTORY], ids=["batch", "trajectory"])
def test_gradient_equals_that_of_the_unfused_loss(objective: Objective) -> None:
    # 1e-5: the weights, rounded to float32, come from another path too.
    assert_same_tree(update(objective).gradient, unfused_gradient(objective), rounding=1e-5)


def test_sums_equal_loops() -> None:
    kl, confidence = reference_scores()
    log_s, log_t = reference_logprobs(1), reference_logprobs(2)
    i = {SKIP: 0.0, WEAK: 0.5, STRONG: 1.0, DET_FAIL: 1.0}
    zeros = lambda: np.zeros(K)  # noqa: E731
    want: dict[str, Any] = dict.fromkeys(("loss", "weight", "tokens", "active"), 0.0)
    want |= dict.fromkeys(("student_entropy", "teacher_entropy", "logprob_error"), 0.0)
    for name in ("divergence", "tokens_by_turn", "weight_by_turn", "confidence", "turns"):
        want[name] = zeros()
    for row in range(len(ROWS)):
        for k in {k for _, k in student_tokens(row)}:
            want["turns"][k] += 1
            want["confidence"][k] += confidence[row, k]
        for t, k in student_tokens(row):
            s = i[int(VERDICT[row, k])] * confidence[row, k]
            want["loss"] += s * kl[row, t]
            want["weight"] += s
            want["tokens"] += 1
            want["active"] += s > 0
            want["divergence"][k] += kl[row, t]
            want["tokens_by_turn"][k] += 1
            want["weight_by_turn"][k] += s
            want["student_entropy"] += entropy(np.exp(log_s[row, t]))
            want["teacher_entropy"] += entropy(np.exp(log_t[row, t]))
            recomputed = log_s[row, t, standard_batch().tokens[row, t]]
            want["logprob_error"] = max(want["logprob_error"], abs(-1.5 - recomputed))
    got = vars(update(SAGE).metrics["sums"])
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_fine_tuning_is_cross_entropy_of_the_tokens() -> None:
    log_s = reference_logprobs(1)
    tokens = standard_batch().tokens
    each = [
        -log_s[row, t, tokens[row, t]] for row in range(len(ROWS)) for t, _ in student_tokens(row)
    ]
    got = update(SFT).metrics
    np.testing.assert_allclose(got["loss"], np.mean(each), rtol=1e-5)
    assert got["z"] == 1
    assert got["sums"].teacher_entropy == 0


# --- Weights of each factor -----------------------------------------------------------------------


def hand_scores(turn_id: np.ndarray) -> tuple[TokenScores, Batch]:
    """Turn 0: two tokens at top-1 .5 and .7; turn 1: one at .8; then one slot that is filling."""
    zeros = jnp.zeros((1, 4))
    scores = TokenScores(
        divergence=jnp.array([[1.0, 2.0, 3.0, jnp.nan]]),
        teacher_top1_prob=jnp.array([[0.5, 0.7, 0.8, jnp.nan]]),
        student_logprob=jnp.array([[-1.0, -1.0, -1.0, jnp.nan]]),
        teacher_logprob=zeros,
        student_entropy=jnp.array([[1.0, 1.0, 1.0, jnp.nan]]),
        teacher_entropy=jnp.array([[2.0, 2.0, 2.0, jnp.nan]]),
    )
    batch = Batch(
        tokens=np.zeros((1, 5), np.int32),
        turn_id=turn_id,
        sampled_logprobs=np.array([[np.nan, -1.25, -1, np.nan, -1]], np.float32),
        verdict=np.array([[WEAK, STRONG]], np.int32),
        response=np.array([[1, 2, 4, 5]], np.int32),
    )
    return scores, batch


@pytest.mark.parametrize(
    ("objective", "by_turn", "loss"),
    [
        # c = .6 and .8; i = .5 and 1: s = .3 and .8
        (SAGE, [0.6, 0.8], 0.3 * 1 + 0.3 * 2 + 0.8 * 3),
        (replace(SAGE, weak_weight=0.25), [0.3, 0.8], 0.15 * 3 + 0.8 * 3),
        (replace(SAGE, confidence=False), [1.0, 1.0], 0.5 * 3 + 3),
        (replace(SAGE, intervention=False), [1.2, 0.8], 0.6 * 3 + 0.8 * 3),
        (OPD, [2.0, 1.0], 6.0),
        # Z of the trajectory is applied here: 3 / 1.4
        (BY_TRAJECTORY, [0.6 * 3 / 1.4, 0.8 * 3 / 1.4], 3.3 * 3 / 1.4),
    ],
)
def test_each_factor_by_hand(objective: Objective, by_turn: list[float], loss: float) -> None:
    scores, batch = hand_scores(np.array([[-1, 0, 0, -1, 1]], np.int32))
    sums = objective_sums(scores, batch, objective=objective)
    np.testing.assert_allclose(sums.weight_by_turn, by_turn, rtol=1e-6)
    np.testing.assert_allclose(sums.weight, sum(by_turn), rtol=1e-6)
    np.testing.assert_allclose(sums.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(sums.divergence, [3.0, 3.0])
    np.testing.assert_allclose(sums.tokens_by_turn, [2.0, 1.0])
    np.testing.assert_allclose([sums.student_entropy, sums.teacher_entropy], [3.0, 6.0])
    np.testing.assert_allclose(sums.logprob_error, 0.25)


@cache
def divergences() -> dict[str, jax.Array]:
    """`score` with each other kind of divergence; one program, in which the models run once."""

    def each(student: Params, teacher: Params, batch: Batch) -> dict[str, jax.Array]:
        kinds = {"forward_kl": None, "jsd": 0.5, "sampled_reverse_kl": None}
        return {
            kind: score(
                student,
                teacher,
                batch,
                student=CONFIG,
                teacher=CONFIG,
                objective=replace(OPD, divergence=kind, beta=beta),
                dtype=jnp.dtype("float32"),
                query_chunk=16,
                loss_chunk=8,
                remat="none",
            ).divergence
            for kind, beta in kinds.items()
        }

    return jax.jit(each)(STUDENT(), TEACHER(), standard_batch())


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "sampled_reverse_kl"])
def test_other_divergences_equal_float64(kind: str) -> None:
    tokens = standard_batch().tokens
    log_s, log_t = reference_logprobs(1), reference_logprobs(2)
    p_s, p_t = np.exp(log_s), np.exp(log_t)
    m = (p_s + p_t) / 2
    pick = lambda x: np.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]  # noqa: E731
    want = {
        "forward_kl": rel_entr(p_t, p_s).sum(-1),
        "jsd": (rel_entr(p_t, m) + rel_entr(p_s, m)).sum(-1) / 2,
        "sampled_reverse_kl": pick(log_s) - pick(log_t),
    }[kind]
    for row in range(len(ROWS)):
        positions = [t for t, _ in student_tokens(row)]
        mine = divergences()[kind][row, : len(positions)]
        np.testing.assert_allclose(mine, want[row, positions], rtol=1e-4, atol=1e-5)


# --- What changes nothing -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        (SAGE, {"micro_batches": 2}),
        (SAGE, {"micro_batches": 4, "remat": "layers"}),  # both save memory and change nothing
        (BY_TRAJECTORY, {"micro_batches": 4}),
        (SAGE, {"batch_rows": 2}),
    ],
    ids=["two", "four_remat", "four_by_trajectory", "more_rows"],
)
def test_any_split_gives_the_same_update(objective: Objective, settings: dict[str, Any]) -> None:
    assert_same_update(update(objective, **settings), update(objective))


def test_a_batch_of_more_rows_is_split_into_more_parts_of_the_same_size() -> None:
    # The same parts, so the same sums in the same order.
    got, want = update(SAGE, batch_rows=2), update(SAGE, micro_batches=2)
    for x, y in zip(jax.tree.leaves(got.gradient), jax.tree.leaves(want.gradient), strict=True):
        np.testing.assert_array_equal(x, y)


def test_neutral_factors_are_bit_for_bit_plain_opd() -> None:
    batch = standard_batch()
    batch = batch.replace(verdict=np.maximum(batch.verdict, WEAK))
    neutral = replace(SAGE, weak_weight=1.0, confidence_temperature=0.0)
    got, want = update(neutral, batch), update(OPD, batch)
    assert got.metrics["loss"] == want.metrics["loss"]
    for x, y in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_array_equal(x, y)
    moved = jax.tree.map(lambda x, y: np.any(x != y), got.params, STUDENT())
    assert all(jax.tree.leaves(moved))


def test_order_of_trajectories_changes_nothing() -> None:
    rows = np.array([2, 0, 3, 1])
    shuffled = jax.tree.map(lambda x: x[rows], standard_batch())
    assert_same_update(update(SAGE, shuffled), update(SAGE))


def test_names_of_turns_change_nothing() -> None:
    batch = standard_batch()
    turns = np.array([1, 2, 0])
    position = np.argsort(turns)
    renamed = batch.replace(
        turn_id=np.where(batch.turn_id == NO_TURN, NO_TURN, position[batch.turn_id]).astype(
            "int32"
        ),
        verdict=batch.verdict[:, turns],
    )
    got, want = update(SAGE, renamed), update(SAGE)
    assert_same_tree(got.gradient, want.gradient)
    np.testing.assert_allclose(got.metrics["z"], want.metrics["z"], rtol=1e-6)
    by_turn = want.metrics["sums"].divergence[turns]
    np.testing.assert_allclose(got.metrics["sums"].divergence, by_turn, rtol=1e-6)


def test_longer_buckets_change_nothing() -> None:
    # T from 12 to 16 and R from 8 to 12 at once.
    longer = make_batch(trajectory(width=16), VERDICT, response_multiple=12)
    assert longer.tokens.shape == (4, 16)
    assert longer.response.shape == (4, 12)
    assert standard_batch().response.shape == (4, 8)
    assert_same_update(update(SAGE, longer), update(SAGE))


def test_more_turn_slots_change_nothing() -> None:
    wide = standard_batch()
    wide = wide.replace(verdict=np.pad(wide.verdict, [(0, 0), (0, 2)], constant_values=STRONG))
    got = objective_sums(scores_of(), wide, objective=SAGE)
    want = objective_sums(scores_of(), standard_batch(), objective=SAGE)
    for name, value in vars(want).items():
        mine = getattr(got, name)
        np.testing.assert_allclose(mine[:K] if value.ndim else mine, value, rtol=1e-6)
        assert not np.any(mine[K:] if value.ndim else 0)


def test_garbage_where_the_student_did_not_write_changes_nothing() -> None:
    t = trajectory()
    padding = np.arange(12) >= t.lengths[:, None]
    rng = np.random.default_rng(7)
    exists = (t.turn_id[..., None] == np.arange(K)).any(axis=1)
    batch = standard_batch()
    dirty = batch.replace(
        tokens=np.where(padding, rng.integers(0, 32, (4, 12)), t.tokens).astype(np.int32),
        sampled_logprobs=np.where(t.turn_id == NO_TURN, np.nan, t.sampled_logprobs),
        verdict=np.where(exists, VERDICT, DET_FAIL).astype(np.int32),
    )
    assert np.any(dirty.tokens != batch.tokens)
    assert np.any(dirty.verdict != batch.verdict)
    got, want = update(SAGE, dirty), update(SAGE)
    assert got.metrics["loss"] == want.metrics["loss"]
    for x, y in zip(jax.tree.leaves(got.gradient), jax.tree.leaves(want.gradient), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.isfinite(got.metrics["sums"].logprob_error)


@cache
def small_gradient():
    """Gradient of the objective to both models, over two rows of which one has a slot to fill.

    One query at a time: no real position attends to padding, which a chunk does with weight 0.
    """
    t = trajectory([".00", ".0_"])
    t = replace(t, tokens=t.tokens[:, :3], turn_id=t.turn_id[:, :3])
    batch = make_batch(t, VERDICT[[0, 2]], response_multiple=1)
    np.testing.assert_array_equal(batch.response, [[1, 2], [1, 3]])

    def loss(student: Params, teacher: Params) -> jax.Array:
        scores = score(
            student,
            teacher,
            batch,
            student=CONFIG,
            teacher=CONFIG,
            objective=SAGE,
            dtype=jnp.dtype("float32"),
            query_chunk=1,
            loss_chunk=8,
            remat="none",
        )
        return objective_sums(scores, batch, objective=SAGE).loss

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def test_a_teacher_that_is_nan_on_padding_changes_nothing() -> None:
    # Token 0, the padding, has a NaN embedding in the teacher: its hidden states there are NaN.
    teacher = TEACHER()
    broken = teacher | {"embed": teacher["embed"].at[0].set(jnp.nan)}
    want, (want_gradient, _) = small_gradient()(STUDENT(), teacher)
    got, (gradient, _) = small_gradient()(STUDENT(), broken)
    assert np.isfinite(want)
    assert got == want
    assert_same_tree(gradient, want_gradient, rounding=0)


def test_teacher_gets_no_gradient() -> None:
    _, (student, teacher) = small_gradient()(STUDENT(), TEACHER())
    assert not any(np.any(x) for x in jax.tree.leaves(teacher))
    assert all(np.any(x) for x in jax.tree.leaves(student))


def test_teacher_is_left_alone() -> None:
    before = jax.tree.map(np.array, TEACHER())
    update(SAGE)
    assert_same_tree(TEACHER(), before, rounding=0)


def test_eight_devices_give_the_same_update_as_one() -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings = param_shardings(param_specs(CONFIG), mesh)
    place = partial(jax.device_put, device=shardings)
    state = init_state(place(STUDENT()), GRADIENT_KEEPER, seed=0)
    placement = placement_of(state)
    step = step_function.__wrapped__(SAGE, placement=placement)
    batch = shard_batch(standard_batch(), mesh)
    got, metrics = step(state, place(TEACHER()), batch)
    want = update(SAGE)
    assert_same_tree(got.opt_state[0].trace, want.gradient)
    for name in ("loss", "z", "grad_norm"):
        np.testing.assert_allclose(metrics[name], want.metrics[name], rtol=ROUNDING)
    # The update leaves everything where it was, so the next one runs the same program.
    assert jax.tree.leaves(placement_of(got)) == jax.tree.leaves(placement)
    step(got, place(TEACHER()), batch)
    assert step._cache_size() == 1
    assert len(batch.tokens.sharding.device_set) == len(placement.step.device_set) == 8


# --- Edges ----------------------------------------------------------------------------------------


def test_all_turns_skipped_leaves_the_student_alone() -> None:
    batch = standard_batch().replace(verdict=np.full((4, K), SKIP, np.int32))
    for objective in (SAGE, BY_TRAJECTORY):
        got = update(objective, batch)
        assert got.metrics["loss"] == 0
        assert got.metrics["grad_norm"] == 0
        assert_same_tree(got.params, STUDENT(), rounding=0)


def test_a_batch_without_student_tokens_has_no_loss() -> None:
    t = trajectory()
    t = replace(t, turn_id=np.full_like(t.turn_id, NO_TURN))
    silent = make_batch(t, VERDICT, response_multiple=8)
    got = update(SAGE, silent)
    assert got.metrics["loss"] == 0
    assert got.metrics["grad_norm"] == 0
    assert got.metrics["sums"].tokens == 0


def test_state_is_donated_and_its_source_is_not() -> None:
    mine, teacher = params(3), TEACHER()
    state = init_state(mine, GRADIENT_KEEPER, seed=0)
    new, _ = step_function(SAGE)(state, teacher, standard_batch())
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.opt_state))
    assert not any(x.is_deleted() for x in jax.tree.leaves((mine, teacher)))
    assert new.step == 1


def test_norms_are_of_the_gradient_and_of_the_update() -> None:
    got = update(SAGE)
    leaves = [x.astype(np.float64) for x in jax.tree.leaves(got.gradient)]
    norm = np.sqrt(sum(np.sum(x**2) for x in leaves))
    np.testing.assert_allclose(got.metrics["grad_norm"], norm, rtol=1e-6)
    np.testing.assert_allclose(got.metrics["update_norm"], norm, rtol=1e-6)


def test_split_deals_the_rows_out_in_turn() -> None:
    batch = standard_batch()
    parts = split(batch, 2)
    assert parts.tokens.shape == (2, 2, 12)
    np.testing.assert_array_equal(parts.tokens[0], batch.tokens[::2])
    np.testing.assert_array_equal(parts.tokens[1], batch.tokens[1::2])
    with pytest.raises(ValueError, match=r"`train.micro_batches`: a batch of 4 .* into 3"):
        split(batch, 3)


def test_an_objective_without_the_teacher_it_needs_is_refused() -> None:
    state = init_state(STUDENT(), GRADIENT_KEEPER, seed=0)
    with pytest.raises(ValueError, match=r"`objective.divergence` = 'reverse_kl'.*got None"):
        step_function(SAGE)(state, None, standard_batch())


# --- The batch ------------------------------------------------------------------------------------


def test_response_holds_the_positions_of_student_tokens() -> None:
    batch = make_batch(trajectory(), VERDICT, response_multiple=4)
    want = [[2, 3, 4, 6, 7, 10, 11], [1, 3], [2, 3, 5, 6, 7], [1, 3, 5, 6, 7, 8, 9]]
    # Seven at most, rounded up to 8; 12, one past the end, where a row has fewer.
    np.testing.assert_array_equal(batch.response, [row + [12] * (8 - len(row)) for row in want])
    assert batch.response.dtype == np.int32


@pytest.mark.parametrize(("multiple", "width"), [(1, 7), (5, 10), (8, 8), (64, 12)])
def test_response_is_rounded_up_within_the_sequence(multiple: int, width: int) -> None:
    batch = make_batch(trajectory(), VERDICT, response_multiple=multiple)
    assert batch.response.shape == (4, width)


def test_response_of_silent_rows_points_past_the_end() -> None:
    t = trajectory([".0__", "...."], width=12)
    batch = make_batch(t, VERDICT[:2], response_multiple=1)
    np.testing.assert_array_equal(batch.response, [[1], [12]])
    silent = replace(t, turn_id=np.full_like(t.turn_id, NO_TURN))
    batch = make_batch(silent, VERDICT[:2], response_multiple=1)
    np.testing.assert_array_equal(batch.response, [[12], [12]])


# --- The optimizer --------------------------------------------------------------------------------

PLAIN = {
    "learning_rate": 1.0,
    "schedule": "constant",
    "warmup_updates": 0,
    "total_updates": 10,
    "weight_decay": 0.0,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 0.0,
    "clip_norm": 0.0,
}


def rates(updates: int, **settings: Any) -> list[float]:
    """Adam moves by exactly the learning rate where the gradient is the same each time."""
    optimizer = make_optimizer(**PLAIN | settings)
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
        ("constant", [1.0] * 7),
        ("linear", [1 - k / 7 for k in range(7)]),
        ("cosine", [(1 + np.cos(np.pi * k / 7)) / 2 for k in range(7)]),
    ],
)
def test_schedule_warms_up_and_then_falls(schedule: str, after: list[float]) -> None:
    got = rates(10, schedule=schedule, warmup_updates=3)
    # Three updates of warm-up on the way to the peak, which is the fourth; none at rate 0.
    np.testing.assert_allclose(got, [0.25, 0.5, 0.75, *after], rtol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_reaches_zero_after_the_last_update(schedule: str) -> None:
    *_, last, beyond = rates(11, schedule=schedule, warmup_updates=3)
    assert last > 0.01
    np.testing.assert_allclose(beyond, 0, atol=1e-7)


def test_without_warm_up_the_first_update_has_the_peak_rate() -> None:
    np.testing.assert_allclose(rates(2, learning_rate=0.5), [0.5, 0.5], rtol=1e-5)
    assert rates(1, warmup_updates=50)[0] > 0  # longer than the run


def test_unknown_schedule_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"`optimizer.schedule`: expected one of constant, .* got"):
        make_optimizer(**PLAIN | {"schedule": "step"})


def test_weight_decay_spares_norms_and_biases() -> None:
    optimizer = make_optimizer(**PLAIN | {"weight_decay": 0.1, "eps": 1e-8})
    specs = param_specs(replace(CONFIG, qk_norm=True, qkv_bias=True))
    student = jax.tree.map(lambda _: jnp.array([1.0, -2.0]), specs, is_leaf=is_spec)
    still = jax.tree.map(jnp.zeros_like, student)
    change, _ = optimizer.update(still, optimizer.init(student), student)
    decayed = {"embed", "head", "q", "k", "v", "o", "gate", "up", "down"}
    spared = {"attn_norm", "mlp_norm", "q_norm", "k_norm", "final_norm"}
    spared |= {"q_bias", "k_bias", "v_bias"}
    seen = set()
    for (path, x), p in zip(
        jax.tree_util.tree_leaves_with_path(change), jax.tree.leaves(student), strict=True
    ):
        name = path[-1].key
        seen.add(name)
        # Without a gradient only decay is left: -rate · decay · parameter.
        np.testing.assert_allclose(x, -0.1 * p if name in decayed else 0 * p, rtol=1e-6)
    assert seen == decayed | spared


def test_gradient_is_clipped_by_its_global_norm() -> None:
    gradient = {"a": jnp.float32(3), "b": jnp.float32(4)}

    def first(clip_norm: float) -> list[float]:
        # With eps = 1 the first update, -g / (|g| + 1), shows the size of g.
        optimizer = make_optimizer(**PLAIN | {"eps": 1.0, "clip_norm": clip_norm})
        change, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
        return [float(change["a"]), float(change["b"])]

    np.testing.assert_allclose(first(1.0), [-0.6 / 1.6, -0.8 / 1.8], rtol=1e-5)
    np.testing.assert_allclose(first(10.0), [-3 / 4, -4 / 5], rtol=1e-5)
    np.testing.assert_allclose(first(0.0), [-3 / 4, -4 / 5], rtol=1e-5)


# --- The state ------------------------------------------------------------------------------------


def test_moments_live_where_their_parameters_live_and_counters_everywhere() -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings = param_shardings(param_specs(CONFIG), mesh)
    state = init_state(jax.device_put(STUDENT(), shardings), ADAMW, seed=0)
    (adam,) = optax.tree_utils.tree_get_all_with_path(state.opt_state, "mu")
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), adam[1], shardings)
    assert all(jax.tree.leaves(same))
    (count, *_) = optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")
    for scalar in (state.step, state.rng, count[1]):
        assert scalar.is_fully_replicated
        assert scalar.devices() == set(mesh.devices.flat)


def test_abstract_state_allocates_nothing() -> None:
    described = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STUDENT()
    )
    assert jax.tree.leaves(abstract_state(described, ADAMW)) == jax.tree.leaves(
        abstract_state(STUDENT(), ADAMW)
    )


def test_abstract_state_describes_the_initial_state() -> None:
    state = init_state(STUDENT(), ADAMW, seed=0)
    abstract = abstract_state(STUDENT(), ADAMW)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)
    assert state.step == 0
    assert jnp.array_equal(jax.random.key_data(state.rng), jax.random.key_data(jax.random.key(0)))
