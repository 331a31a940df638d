"""SAGE-OPD with models in equinox: the losses take arrays, so the module is yours.

pip install equinox && python docs/examples/with_equinox.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import opd_jax.losses as opd

VOCAB, TURNS = 50, 3
tokens = jax.random.randint(jax.random.key(0), (4, 24), 0, VOCAB)  # [B, T]
# Each turn: five tokens of an observation, then three of the student's.
turn_id = jnp.where(jnp.arange(24) % 8 < 5, opd.NO_TURN, jnp.arange(24) // 8)
response = jnp.flatnonzero(turn_id != opd.NO_TURN)  # here each row has them at the same places
turn = turn_id[response][None].repeat(4, axis=0)  # [B, R]
verdict = jax.random.randint(jax.random.key(1), (4, TURNS), 0, 3)  # SKIP, WEAK or STRONG


class Model(eqx.Module):
    embed: eqx.nn.Embedding
    layer: eqx.nn.Linear
    head: jax.Array  # [D, V]

    def __init__(self, width: int, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(VOCAB, width, key=keys[0])
        self.layer = eqx.nn.Linear(width, width, key=keys[1])
        self.head = jax.random.normal(keys[2], (width, VOCAB)) / width**0.5

    def __call__(self, row: jax.Array) -> jax.Array:
        """Hidden states that predict one row's student tokens: those one position earlier."""
        mean = jnp.cumsum(jax.vmap(self.embed)(row), axis=0) / jnp.arange(1, 25)[:, None]
        return jax.vmap(self.layer)(jax.nn.relu(mean))[response - 1]


@eqx.filter_jit
@eqx.filter_value_and_grad
def loss_and_gradient(student: Model, teacher: Model) -> jax.Array:
    mine, its = (jax.vmap(m)(tokens).reshape(-1, len(m.head)) for m in (student, teacher))
    heads = mine, student.head, its, teacher.head
    divergence, top1 = opd.fused_divergence(*heads, kind="reverse_kl", chunk_size=16)
    confidence = opd.turn_confidence(top1.reshape(turn.shape), turn, num_turns=TURNS)
    weight, _ = opd.sage_weights(turn, verdict, confidence)
    return opd.weighted_loss(divergence.reshape(turn.shape), weight, turn)


student, teacher = Model(16, jax.random.key(2)), Model(32, jax.random.key(3))
optimizer = optax.adam(0.01)
opt_state = optimizer.init(eqx.filter(student, eqx.is_array))
for n in range(61):
    loss, gradient = loss_and_gradient(student, teacher)
    updates, opt_state = optimizer.update(gradient, opt_state)
    student = eqx.apply_updates(student, updates)
    if n % 20 == 0:
        print(f"step {n}: loss {loss:.4f}")
