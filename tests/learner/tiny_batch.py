"""Four short rows written as text, a tiny student and teacher, and what both say in float64."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from models import TINY
from scipy.special import log_softmax
from updates import teacher_of

from opd_jax import model
from opd_jax.agent.conversation import Conversation
from opd_jax.learner.batch import Batch, pack
from opd_jax.learner.teacher import Teacher
from opd_jax.losses import NO_TURN, Verdict
from opd_jax.model import Params, init_params

SKIP, WEAK, STRONG, DET_FAIL = (int(v) for v in Verdict)

CONFIG = replace(TINY, d_ff=32, qk_norm=False)

# A character is a token: a digit for the turn that sampled it, a dot for a given token. Rows differ
# in length and in weight, so a scale that is taken over a part of the batch shows.
ROWS = ("..000.11..22", ".0.1", "..00.111", ".0.1.22222")
VERDICT = np.array(
    [
        [WEAK, STRONG, SKIP],
        [SKIP, DET_FAIL, STRONG],  # the row has no third turn, so nobody reads this verdict
        [STRONG, WEAK, SKIP],
        [SKIP, WEAK, STRONG],
    ],
    np.int32,
)
B, T, K = len(ROWS), 12, 3
# Nobody asked about one turn that is there.
RELIABILITY = np.array(
    [[1.0, 0.25, 0.5], [0.75, 0.5, 1.0], [0.25, np.nan, 0.0], [0.0, 0.5, 1.0]], np.float32
)
# Two micro-batches, one of rows without padding and one of rows that end at the half.
LONG_AND_SHORT = ("..000.11..22", "..00.1", "..00.111.222", ".0.1.2")
# Every student token as (row, position, turn).
STUDENT_TOKENS = [(b, t, int(c)) for b in range(B) for t, c in enumerate(ROWS[b]) if c.isdigit()]
STUDENT_MASK = np.zeros((B, T), bool)
STUDENT_MASK[tuple(zip(*[(b, t) for b, t, _ in STUDENT_TOKENS], strict=True))] = True


def conversations(rows: Sequence[str] = ROWS) -> list[Conversation]:
    """The rows as episodes, with random tokens, each sampled at log-probability -1.5."""
    rng = np.random.default_rng(0)
    made = []
    for text in rows:
        turn_id = [int(c) if c.isdigit() else NO_TURN for c in text]
        tokens = rng.integers(1, CONFIG.vocab_size, len(text)).tolist()
        logprobs = [0.0 if turn == NO_TURN else -1.5 for turn in turn_id]
        made.append(Conversation(None, tokens=tokens, turn_id=turn_id, logprobs=logprobs))
    return made


def make_batch(
    rows: Sequence[str] = ROWS, *, length_multiple: int = T, response_multiple: int = 8
) -> Batch:
    return pack(
        conversations(rows),
        VERDICT[: len(rows)],
        length_multiple=length_multiple,
        response_multiple=response_multiple,
        vocab_size=CONFIG.vocab_size,
        labels={"reliability": RELIABILITY[: len(rows)]},
    )


@cache
def params(seed: int) -> Params:
    """Random parameters, no norm at one and no bias at zero; logits far from uniform."""
    leaves, treedef = jax.tree.flatten(init_params(CONFIG, jax.random.key(seed), dtype=jnp.float32))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        treedef, [x + 0.2 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    )


STUDENT, TEACHER = partial(params, 1), partial(params, 2)


def read_by_teacher(batch: Batch) -> Teacher:
    return teacher_of(CONFIG, TEACHER(), batch)


@cache
def logprobs(who: int) -> np.ndarray:
    """log p of every token of the vocabulary, float64 [B, T, V]; entry t predicts token t."""
    tokens = make_batch().tokens
    hidden = model.forward(params(who), tokens, config=CONFIG, query_chunk=16, remat="none")
    logits = np.asarray(hidden, np.float64) @ np.asarray(params(who)["head"], np.float64)
    return np.roll(log_softmax(logits, axis=-1), 1, axis=1)
