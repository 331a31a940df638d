"""SAGE-OPD with models in flax nnx: the losses take arrays, so the module is yours.

python docs/examples/flax_nnx.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import opd_jax.losses as opd

VOCAB, TURNS = 50, 3
tokens = jax.random.randint(jax.random.key(0), (4, 24), 0, VOCAB)  # [B, T]
# Each turn: five tokens of an observation, then three of the student's.
turn_id = jnp.where(jnp.arange(24) % 8 < 5, opd.NO_TURN, jnp.arange(24) // 8)
response = jnp.flatnonzero(turn_id != opd.NO_TURN)  # here each row has them at the same places
turn = turn_id[response][None].repeat(4, axis=0)  # [B, R]
verdict = jax.random.randint(jax.random.key(1), (4, TURNS), 0, 3)  # SKIP, WEAK or STRONG


class Model(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, width, rngs=rngs)
        self.cell = nnx.RNN(nnx.GRUCell(width, width, rngs=rngs))
        self.head = nnx.Linear(width, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Hidden states that predict the student's tokens: those one position earlier."""
        hidden = self.cell(self.embed(tokens))[:, response - 1]
        return hidden.reshape(-1, hidden.shape[-1])


def loss_fn(student: Model, teacher: Model) -> jax.Array:
    heads = student(tokens), student.head.kernel[...], teacher(tokens), teacher.head.kernel[...]
    divergence, top1 = opd.fused_divergence(*heads, kind="reverse_kl", chunk_size=16)
    confidence = opd.turn_confidence(top1.reshape(turn.shape), turn, num_turns=TURNS)
    weight, _ = opd.sage_weights(turn, verdict, confidence)
    return opd.weighted_loss(divergence.reshape(turn.shape), weight, turn)


@nnx.jit
def step(student: Model, optimizer: nnx.Optimizer, teacher: Model) -> jax.Array:
    loss, gradient = nnx.value_and_grad(loss_fn)(student, teacher)
    optimizer.update(student, gradient)
    return loss


student, teacher = Model(16, rngs=nnx.Rngs(2)), Model(32, rngs=nnx.Rngs(3))
optimizer = nnx.Optimizer(student, optax.adam(0.01), wrt=nnx.Param)
for n in range(61):
    loss = step(student, optimizer, teacher)
    if n % 20 == 0:
        print(f"step {n}: loss {loss:.4f}")
