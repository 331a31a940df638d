"""The optimizer: AdamW with a schedule; the gradient is clipped first."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import optax

from opd_jax.model import Params
from opd_jax.runtime.fields import check_choice, check_within

# (peak, updates after the warm-up) to the rate.
SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda peak, _: optax.constant_schedule(peak),
    "cosine": optax.cosine_decay_schedule,
    "linear": lambda peak, updates: optax.linear_schedule(peak, 0.0, updates),
}

# With a decay of 1 the bias correction of a moment divides by zero.
_BELOW_ONE = 1 - 1e-9


@dataclass(frozen=True)
class AdamW:
    """AdamW's settings.

    Attributes:
      learning_rate: the highest rate.
      schedule: the rate after the warm-up: "constant", or "cosine" or "linear" to 0 at the last
        update.
      warmup_updates: the rate rises linearly for this many updates.
      weight_decay: decay of matrices; norms and biases have none.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      clip_norm: bound on the gradient's global norm; 0 for none.
    """

    learning_rate: float
    schedule: str
    warmup_updates: int
    weight_decay: float
    b1: float
    b2: float
    eps: float
    clip_norm: float

    def __post_init__(self):
        check_choice(SCHEDULES, schedule=self.schedule)
        check_within(
            0,
            learning_rate=self.learning_rate,
            warmup_updates=self.warmup_updates,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
        )
        check_within(0, _BELOW_ONE, b1=self.b1, b2=self.b2)
        check_within(1e-30, eps=self.eps)


def learning_rate(adamw: AdamW, *, total_updates: int) -> optax.Schedule:
    """The rate of a step in a run of `total_updates`, by how many steps came before it."""
    peak, warmup_updates = adamw.learning_rate, adamw.warmup_updates
    decay_updates = max(total_updates - warmup_updates, 1)
    after = SCHEDULES[adamw.schedule](peak, decay_updates)
    # The first rate is above 0: an update at rate 0 would be wasted.
    warmup = optax.linear_schedule(peak / (warmup_updates + 1), peak, max(warmup_updates, 1))
    return optax.join_schedules([warmup, after], [warmup_updates])


def make_optimizer(adamw: AdamW, *, total_updates: int) -> optax.GradientTransformation:
    """The optimizer of a run of `total_updates`."""
    optimizer = optax.adamw(
        learning_rate(adamw, total_updates=total_updates),
        b1=adamw.b1,
        b2=adamw.b2,
        eps=adamw.eps,
        weight_decay=adamw.weight_decay,
        mask=_decayed,
    )
    if not adamw.clip_norm:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(adamw.clip_norm), optimizer)


def _decayed(params: Params) -> Params:
    """True for matrices: every parameter that is neither a norm's scale nor a bias."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not str(path[-1].key).endswith(("norm", "bias")), params
    )
