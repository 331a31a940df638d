"""A student of one's own, a minGRU (arXiv 2410.01201), learns on-policy from our teacher.

python docs/examples/own_model.py
"""

import jax
import jax.numpy as jnp
import optax

from opd_jax.agent import agent, rollout
from opd_jax.config import build, models, settings
from opd_jax.configs import quickstart
from opd_jax.envs.household.env import Household
from opd_jax.learner import batch, teacher, train_state, train_step
from opd_jax.model import Model, head_params
from opd_jax.runtime.mesh import make_mesh

B, D = 8, 64


def append(params, h, lengths, tokens, counts):  # h[t] = (1 - z[t]) h[t-1] + z[t] c[t]
    x, new = params["embed"][tokens], jnp.arange(tokens.shape[1]) < counts[:, None]
    z = jax.nn.sigmoid(x @ params["z"]) * new[..., None]
    steps = 1 - z, z * (x @ params["c"])  # (a, b) is h -> a h + b
    join = lambda f, g: (f[0] * g[0], g[0] * f[1] + g[1])  # noqa: E731
    a, b = jax.lax.associative_scan(join, steps, axis=1)
    h = a * jnp.where(lengths[:, None] > 0, h, 0)[:, None] + b
    return x + h @ params["out"], h[:, -1]


def hidden(params, tokens):
    counts = jnp.full(len(tokens), tokens.shape[1])
    return append(params, jnp.zeros((len(tokens), D)), 0 * counts, tokens, counts)[0]


student = Model(hidden, lambda p: p["head"], lambda p, rows, slots: jnp.zeros((rows, D)), append)
config = quickstart.get_config("runlocal")
config.env.max_turns, config.objective.divergence = 3, "forward_kl"  # a new student has no modes
how = settings.read_settings(config)
ours = models.load_teacher(how, make_mesh(data=1, fsdp=1, tensor=1))
V, keys = ours.config.vocab_size, iter(jax.random.split(jax.random.key(0), 99))
shapes = dict(embed=(V, D), z=(D, D), c=(D, D), out=(D, D), head=(D, V))
params = {k: jax.random.normal(next(keys), s) / D**0.5 for k, s in shapes.items()}
player = agent.Agent(student, ours.tokenizer, ours.chat, how.rollout)
envs = [Household(size="small", max_turns=3, show_admissible=0) for _ in range(B)]
judge, optimizer = build.make_labeller(how, ours), optax.adam(1e-2)
state = train_state.init_state(params, optimizer, seed=0)
whole = dict(micro_batches=1, batch_rows=B)
read = teacher.make_teacher_pass(ours.config, query_chunk=128, **whole)
whole |= dict(optimizer=optimizer, placement=None, dtype=jnp.dtype("float32"), loss_chunk=512)
step = train_step.make_train_step(student=student, objective=how.objective, **whole)
for n in range(24):
    tasks, row_keys = [("train", B * n + k) for k in range(B)], jax.random.split(next(keys), B)
    played = rollout.rollout(state.params, row_keys, agent=player, envs=envs, tasks=tasks, depth=0)
    verdict, size = judge(played, n).verdict, dict(length_multiple=384, response_multiple=96)
    rows = batch.pack(played, verdict, vocab_size=V, **size)
    scored = teacher.Teacher(read(ours.params, rows), head_params(ours.params))
    state, raw = step(state, scored, rows)
    print(f"update {n}: loss {raw['loss']:.3f} logprob_error {raw['sums'].logprob_error:.1e}")
