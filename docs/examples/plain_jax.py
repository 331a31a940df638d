"""SAGE-OPD in a plain JAX loop: a small model learns from a larger one, turn by turn.

    python docs/examples/plain_jax.py

The tokens are given here; in a real run the student samples them, and the teacher judges the turns.
"""

import jax
import jax.numpy as jnp
import optax

import opd_jax.losses as opd

VOCAB, TURNS = 50, 3
key = iter(jax.random.split(jax.random.key(0), 8))
tokens = jax.random.randint(next(key), (4, 24), 0, VOCAB)  # [B, T]
# Each turn: five tokens of an observation, then three of the student's.
position = jnp.arange(24)
turn_id = jnp.where(position % 8 < 5, opd.NO_TURN, position // 8)[None].repeat(4, axis=0)
verdict = jax.random.randint(next(key), (4, TURNS), 0, 3)  # SKIP, WEAK or STRONG, [B, K]
response = jnp.flatnonzero(turn_id[0] != opd.NO_TURN)  # here each row has them at the same places
turn = turn_id[:, response]  # [B, R]


def init(width):
    embed, head = jax.random.normal(next(key), (2, VOCAB, width)) / width**0.5
    return {"embed": embed, "head": head.T}


def states(params):
    """Hidden states that predict the student's tokens, [B * R, D]: those one position earlier."""
    hidden = jax.lax.associative_scan(jnp.add, params["embed"][tokens], axis=1)
    hidden = hidden / jnp.sqrt(1.0 + position)[:, None]
    return hidden[:, response - 1].reshape(-1, hidden.shape[-1])


def loss_fn(params, teacher):
    heads = states(params), params["head"], states(teacher), teacher["head"]
    divergence, top1 = opd.fused_divergence(*heads, kind="reverse_kl", chunk_size=16)
    confidence = opd.turn_confidence(top1.reshape(turn.shape), turn, num_turns=TURNS)
    weight, _ = opd.sage_weights(turn, verdict, confidence)
    return opd.weighted_loss(divergence.reshape(turn.shape), weight, turn)


@jax.jit
def step(params, opt_state, teacher):
    loss, gradient = jax.value_and_grad(loss_fn)(params, teacher)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss


student, teacher, optimizer = init(16), init(32), optax.adam(0.03)
opt_state = optimizer.init(student)
for n in range(61):
    student, opt_state, loss = step(student, opt_state, teacher)
    if n % 20 == 0:
        print(f"step {n}: loss {loss:.4f}")
