"""What an update changes: trained parameters and the optimizer's state, and their shardings."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding

from opd_jax.model import Params
from opd_jax.runtime.checkpoint import Checkpoints
from opd_jax.runtime.mesh import replicated


@struct.dataclass
class TrainState:
    """Everything an update changes, and all that resuming needs on the device.

    Attributes:
      params: what is trained, in the dtype it is trained in: the student's parameters, or only its
        adapters (`lora`).
      opt_state: optax state.
      step: int32 [], updates done.
      rng: the run's PRNG key. Update n draws with this key folded with n.
    """

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    rng: jax.Array


def init_state(params: Params, optimizer: optax.GradientTransformation, *, seed: int) -> TrainState:
    """The state before the first update, sharded as `abstract_state` says; copies `params`."""

    def fresh(params: Params) -> TrainState:
        # Copied: the state is donated by the first update, and `params` belongs to the caller.
        return _first_state(jax.tree.map(jnp.copy, params), optimizer, seed)

    placement = placement_of(abstract_state(params, optimizer))
    return jax.jit(fresh, out_shardings=placement)(params)


def restore_or_init(
    checkpoints: Checkpoints,
    untrained: Params,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
) -> tuple[TrainState, dict[str, Any]]:
    """The state and `meta` of the newest checkpoint; without one, `init_state` and {}.

    `untrained` are the parameters to train, before any update.
    """
    restored = checkpoints.restore_latest(abstract_state(untrained, optimizer))
    if restored is None:
        return init_state(untrained, optimizer, seed=seed), {}
    _, state, meta = restored
    return state, meta


def abstract_state(params: Params, optimizer: optax.GradientTransformation) -> Any:
    """`init_state` as a `TrainState` of `ShapeDtypeStruct`s, to restore a checkpoint into.

    Optimizer moments are sharded as their parameters are. Everything else is replicated. `params`
    are arrays, or `ShapeDtypeStruct`s with shardings.
    """
    state = jax.eval_shape(partial(_first_state, optimizer=optimizer, seed=0), params)
    everywhere = _everywhere(jax.tree.leaves(params)[0].sharding)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda moment, parameter: _placed(moment, parameter.sharding),
        state.opt_state,
        params,
        transform_non_params=lambda x: _placed(x, everywhere),
    )
    return dataclasses.replace(
        state,
        params=jax.tree.map(lambda x, p: _placed(x, p.sharding), state.params, params),
        opt_state=opt_state,
        step=_placed(state.step, everywhere),
        rng=_placed(state.rng, everywhere),
    )


def _placed(x: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def placement_of(state: Any) -> Any:
    """The sharding of every array of a `TrainState`, or of every leaf of `abstract_state`."""
    return jax.tree.map(lambda x: x.sharding, state)


def is_whole(state: TrainState) -> bool:
    """Whether all of the state is there: an update that began has taken it (donation)."""
    return not any(x.is_deleted() for x in jax.tree.leaves(state))


def _everywhere(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Replication over the devices of a parameter."""
    if isinstance(sharding, NamedSharding):
        return replicated(sharding.mesh)
    return sharding


def _first_state(params: Params, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
        rng=jax.random.key(seed),
    )
