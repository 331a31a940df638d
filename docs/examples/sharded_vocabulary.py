"""SAGE-OPD under `shard_map`: rows over one mesh axis, the vocabulary over another.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python docs/examples/sharded_vocabulary.py

Each device has some rows and some columns of both heads. Its weights need the totals of all rows,
so they are summed before the scale z is made of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import opd_jax.losses as opd

B, R, K, V, D = 8, 6, 2, 64, 16
key = iter(jax.random.split(jax.random.key(0), 6))
turn = jnp.repeat(jnp.arange(K), R // K)[None].repeat(B, axis=0)  # [B, R]: no padding here
verdict = jax.random.randint(next(key), (B, K), 0, 3)  # SKIP, WEAK or STRONG
hidden = jax.random.normal(next(key), (2, B, R, D))  # of student and teacher
heads = jax.random.normal(next(key), (2, D, V)) / D**0.5


def loss(heads, hidden, turn, verdict, *, vocabulary=None, rows=None):
    """Σ z · i · c · d / N of all rows, from this device's part of everything."""
    flat = hidden.reshape(2, -1, D)
    divergence, top1 = opd.fused_divergence(
        flat[0], heads[0], flat[1], heads[1], kind="reverse_kl", chunk_size=8, axis_name=vocabulary
    )
    confidence = opd.turn_confidence(top1.reshape(turn.shape), turn, num_turns=K)
    how = dict(weak_weight=0.5, token_factor=None, scope="batch")
    weight, totals = opd.raw_weights(turn, verdict, confidence, **how)
    total = opd.weighted_sum(divergence.reshape(turn.shape), weight, turn)
    if rows:
        total, totals = jax.lax.psum((total, totals), rows)
    z = opd.scale(totals, normalize="all_tokens", eps=1e-6, max_z=None)
    return z * total / totals.tokens


automatic = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((2, 4), ("rows", "vocabulary"), axis_types=automatic)
split = jax.shard_map(
    functools.partial(loss, vocabulary="vocabulary", rows="rows"),
    mesh=mesh,
    in_specs=(P(None, None, "vocabulary"), P(None, "rows"), P("rows"), P("rows")),
    out_specs=P(),
)
whole, gradient = jax.value_and_grad(loss)(heads, hidden, turn, verdict)
parts, same = jax.jit(jax.value_and_grad(split))(heads, hidden, turn, verdict)
print(f"loss {whole:.6f} on one device, {parts:.6f} on {mesh.size}")
print(f"largest difference of the gradients {jnp.abs(gradient - same).max():.1e}")
