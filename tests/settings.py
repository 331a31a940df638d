"""Settings from the name of a config, and a mesh of one device."""

import jax

from opd_jax.config import load
from opd_jax.config.settings import Settings, read_settings
from opd_jax.runtime.mesh import make_mesh


def read(name: str, *changes: str) -> Settings:
    """The settings of a config, with changes such as `train.updates=3` or flags of a command."""
    flags = [change if change.startswith("--") else f"--config.{change}" for change in changes]
    return read_settings(load(name, flags))


def one_device() -> jax.sharding.Mesh:
    return make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
