"""One token of a real update, by hand: from what two models say of it to its share of the loss.

Read this to know what the loss is. The embedded student plays two episodes in a small household.
The embedded teacher judges their turns. The student is updated once, by the functions that a run
calls. Then the loss is written out again in float64 numpy, one formula a line, and compared.
"""

from pathlib import Path

import numpy as np
import pytest

from opd_jax import model
from opd_jax.config import build, load
from opd_jax.config.models import LoadedModel, load_student, load_teacher
from opd_jax.config.settings import read_settings
from opd_jax.learner.train_state import init_state
from opd_jax.losses import NO_TURN, Verdict, entropy_factor, sage_weights, turn_confidence
from opd_jax.runtime.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("compile_quickly")

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"
BONUS, THRESHOLD = 1.0, 0.5  # of e; the quickstart itself has e = 1
CHANGES = [
    "--config.rollout.batch=2",
    "--config.env.max_turns=4",
    "--config.judge.agreement_every=0",
    f"--config.objective.entropy_bonus={BONUS}",
    f"--config.objective.entropy_threshold={THRESHOLD}",
]
INTERVENTION = {Verdict.SKIP: 0.0, Verdict.WEAK: 0.5, Verdict.STRONG: 1.0, Verdict.DET_FAIL: 1.0}


def logprobs(loaded: LoadedModel, tokens: np.ndarray) -> np.ndarray:
    """log p of the whole vocabulary, float64 [B, T, V]. Entry t is about token t."""
    hidden = model.forward(
        loaded.params, tokens, config=loaded.config, query_chunk=128, remat="none"
    )
    logits = np.asarray(hidden @ model.head(loaded.params), np.float64)
    before = np.roll(logits, 1, axis=1)  # the hidden state at t - 1 predicts token t
    return before - np.log(np.exp(before).sum(axis=-1, keepdims=True))


def test_a_token_from_its_logits_to_its_share_of_the_loss() -> None:
    # 1. Two models, and the state of a run before its first update.
    settings = read_settings(load(f"{QUICKSTART}:runlocal", CHANGES))
    mesh = make_mesh(data=1, fsdp=1, tensor=1)
    student, teacher = load_student(settings, mesh), load_teacher(settings, mesh)
    assert teacher is not None
    state = init_state(student.params, build.optimizer(settings), seed=settings.seed)

    # 2. Roll out, judge, pack, update: the page `train.py`, once.
    tasks = build.panels(settings)["train"]
    source = build.make_source(settings, student, teacher, tasks=tasks, cursor=[0, 0])
    played = source.play(state)
    verdict, _ = build.make_labeller(settings, teacher)(played.conversations, 0)
    batch = build.make_pack(settings, student.config)(played, verdict)
    _, reported = build.make_update(settings, student, teacher, state)(state, batch)

    # 3. What the two models say of every token.
    log_s, log_t = logprobs(student, batch.tokens), logprobs(teacher, batch.tokens)
    turn_id = batch.turn_id
    student_tokens = [(b, t) for b, t in np.argwhere(turn_id != NO_TURN)]
    N = len(student_tokens)

    # 4. The divergence of a token: the reverse KL, in nats.
    def d(b: int, t: int) -> float:
        return np.sum(np.exp(log_s[b, t]) * (log_s[b, t] - log_t[b, t]))

    # 5. The factors of its weight. i and c belong to its turn k, e is its own.
    def i(b: int, k: int) -> float:
        return INTERVENTION[verdict[b, k]]

    def c(b: int, k: int) -> float:
        return np.mean([np.exp(log_t[b, t]).max() for t in np.flatnonzero(turn_id[b] == k)])

    def entropy(b: int, t: int) -> float:
        return -np.sum(np.exp(log_t[b, t]) * log_t[b, t])

    def e(b: int, t: int) -> float:
        return 1 + BONUS if entropy(b, t) > THRESHOLD else 1.0

    def s(b: int, t: int) -> float:
        return i(b, turn_id[b, t]) * c(b, turn_id[b, t]) * e(b, t)

    # 6. The scale that brings the mean weight of the batch to one.
    z = N / sum(s(b, t) for b, t in student_tokens)

    # 7. A token's share of the loss. The shares of all tokens are the loss that the run reports.
    def share(b: int, t: int) -> float:
        return z * s(b, t) * d(b, t) / N

    np.testing.assert_allclose(
        reported["loss"], sum(share(b, t) for b, t in student_tokens), rtol=1e-6
    )
    np.testing.assert_allclose(reported["z"], z, rtol=1e-6)

    # 8. The token with the largest share, through the functions that a library user calls.
    b, t = max(student_tokens, key=lambda at: share(*at))
    np.testing.assert_allclose(
        log_s[b, t, batch.tokens[b, t]], batch.sampled_logprobs[b, t], rtol=0, atol=1e-4
    )
    K = verdict.shape[1]
    top1 = np.exp(log_t).max(axis=-1)
    factor = entropy_factor(
        -np.sum(np.exp(log_t) * log_t, axis=-1), bonus=BONUS, threshold=THRESHOLD
    )
    weight, scale = sage_weights(
        turn_id, verdict, turn_confidence(top1, turn_id, K), token_factor=factor
    )
    np.testing.assert_allclose(scale, z, rtol=1e-6)
    np.testing.assert_allclose(weight[b, t] / scale, s(b, t), rtol=1e-6)
    print(
        b,
        t,
        d(b, t),
        i(b, turn_id[b, t]),
        c(b, turn_id[b, t]),
        e(b, t),
        z,
        share(b, t),
        reported["loss"],
    )
    print(sorted(entropy(*at) for at in student_tokens)[-12:])

    # 9. Nothing above was idle: turns have several verdicts, and e tells tokens apart.
    assert len({i(b, turn_id[b, t]) for b, t in student_tokens}) > 1
    assert len({e(b, t) for b, t in student_tokens}) > 1
