"""The optimizer: AdamW with a schedule, behind a clip of the gradient."""

import jax
import optax

from opd_jax.model import Params


def make_optimizer(
    *,
    learning_rate: float,
    schedule: str,
    warmup_updates: int,
    total_updates: int,
    weight_decay: float,
    b1: float,
    b2: float,
    eps: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """AdamW with a warm-up, behind a clip of the gradient's global norm.

    Weight decay spares norms and biases.

    Args:
      learning_rate: peak.
      schedule: after the warm-up: "constant", "cosine" or "linear" to 0 at `total_updates`.
      warmup_updates: linear, reaching the peak after so many.
      total_updates: length of the run.
      weight_decay: AdamW's.
      b1: decay of the first moment.
      b2: decay of the second.
      eps: AdamW's.
      clip_norm: 0 switches clipping off.

    Raises:
      ValueError: an unknown schedule.
    """
    decay_updates = max(total_updates - warmup_updates, 1)
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "cosine": optax.cosine_decay_schedule(learning_rate, decay_updates),
        "linear": optax.linear_schedule(learning_rate, 0.0, decay_updates),
    }
    if schedule not in after:
        raise ValueError(
            f"`optimizer.schedule`: expected one of {', '.join(after)}, got {schedule!r}"
        )
    # From the first update on the rate is above 0: an update at rate 0 would be lost.
    first = learning_rate / (warmup_updates + 1)
    warmup = optax.linear_schedule(first, learning_rate, max(warmup_updates, 1))
    rate = optax.join_schedules([warmup, after[schedule]], [warmup_updates])
    adamw = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_decayed)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw


def _decayed(params: Params) -> Params:
    """True for matrices: every parameter that is neither a norm's scale nor a bias."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not str(path[-1].key).endswith(("norm", "bias")), params
    )
