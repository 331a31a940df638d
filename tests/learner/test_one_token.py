"""One token of a real update, by hand: from what two models say of it to its share of the loss.

One of the three tests to read first: it shows what the loss is. The embedded student plays two
episodes in a small household. The embedded teacher judges their turns. The student is updated once,
by the functions that a run calls. Then the loss is written out again in float64 numpy, one formula
a line, and compared.
"""

from functools import partial

import jax
import numpy as np
import pytest
from scipy.special import log_softmax
from settings import one_device, read

from opd_jax import model
from opd_jax.config import build
from opd_jax.config.models import LoadedModel, load_student, load_teacher
from opd_jax.learner.train_state import init_state
from opd_jax.losses import NO_TURN, Verdict, sage_weights, turn_confidence

pytestmark = pytest.mark.usefixtures("compile_quickly")

CHANGES = [
    *("rollout.batch=2", "env.max_turns=4", "judge.agreement_every=0"),
    "judge.batch=8",  # one question for each turn
]
INTERVENTION = {Verdict.SKIP: 0.0, Verdict.WEAK: 0.5, Verdict.STRONG: 1.0, Verdict.DET_FAIL: 1.0}


def logprobs(loaded: LoadedModel, tokens: np.ndarray) -> np.ndarray:
    """log p of every token of the vocabulary, float64 [B, T, V]. Entry t is about token t."""
    forward = jax.jit(partial(model.forward, config=loaded.config, query_chunk=128, remat="none"))
    hidden = forward(loaded.params, tokens)
    logits = np.asarray(hidden @ model.head(loaded.params), np.float64)
    return np.roll(log_softmax(logits, axis=-1), 1, axis=1)  # position t - 1 predicts token t


def test_a_token_from_its_logits_to_its_share_of_the_loss() -> None:
    # 1. Two models, and the state of a run before its first update.
    settings = read("quickstart:runlocal", *CHANGES)
    student = load_student(settings, one_device())
    teacher = load_teacher(settings, one_device())
    assert teacher is not None
    state = init_state(student.params, build.optimizer(settings), seed=settings.seed)

    # 2. Roll out, judge, pack, update: one round of the loop in train.py.
    tasks = build.panels(settings)["train"]
    source = build.make_source(settings, student, teacher, tasks=tasks, cursor=[0, 0])
    played = source.play(state)
    verdict = build.make_labeller(settings, teacher)(played.conversations, 0).verdict
    batch = build.make_pack(settings, student.config)(played, verdict)
    _, reported = build.make_update(settings, student, teacher, state)(state, batch, None)

    # 3. What the two models say of every token.
    log_s, log_t = logprobs(student, batch.tokens), logprobs(teacher, batch.tokens)
    p_s, p_t = np.exp(log_s), np.exp(log_t)
    turn_id = batch.turn_id
    student_tokens = [(b, t) for b, t in np.argwhere(turn_id != NO_TURN)]
    N = len(student_tokens)

    # 4. The divergence of a token: the reverse KL, in nats.
    def d(b: int, t: int) -> float:
        return np.sum(p_s[b, t] * (log_s[b, t] - log_t[b, t]))

    # 5. The two factors of its weight, which are those of its turn k.
    def i(b: int, k: int) -> float:
        return INTERVENTION[verdict[b, k]]

    def c(b: int, k: int) -> float:
        return np.mean([p_t[b, t].max() for t in np.flatnonzero(turn_id[b] == k)])

    def s(b: int, t: int) -> float:
        k = turn_id[b, t]
        return i(b, k) * c(b, k)

    # 6. The scale. It brings the mean weight of all student tokens to one.
    z = N / sum(s(b, t) for b, t in student_tokens)

    # 7. The token's share of the loss. The shares of all tokens add up to the loss of the run.
    def share(b: int, t: int) -> float:
        return z * s(b, t) * d(b, t) / N

    loss = sum(share(b, t) for b, t in student_tokens)
    np.testing.assert_allclose(reported["z"], z, rtol=1e-6)
    np.testing.assert_allclose(reported["loss"], loss, rtol=1e-6)

    # 8. Take the token with the largest share. The public functions give it the same weight.
    b, t = max(student_tokens, key=lambda token: share(*token))
    weight, scale = sage_weights(
        turn_id,
        verdict,
        turn_confidence(p_t.max(axis=-1), turn_id, num_turns=verdict.shape[1]),
    )
    np.testing.assert_allclose(scale, z, rtol=1e-6)
    np.testing.assert_allclose(weight[b, t], z * s(b, t), rtol=1e-6)

    # 9. It is the very token that was sampled, at the log-probability it was sampled with.
    np.testing.assert_allclose(
        log_s[b, t, batch.tokens[b, t]], batch.sampled_logprobs[b, t], rtol=0, atol=1e-4
    )

    # 10. No factor was idle: they differ between turns.
    assert len({i(b, turn_id[b, t]) for b, t in student_tokens}) > 1
    assert len({c(b, turn_id[b, t]) for b, t in student_tokens}) > 1
