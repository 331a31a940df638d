"""Configs: one Python file per experiment, read into typed settings.

A file ``NAME.py`` defines ``get_config(arg)``, which returns an ``ml_collections.ConfigDict`` with
every default. ``--config=NAME:runlocal,student=1.7b`` passes the text after the colon as ``arg``,
and the file reads it with `parse_arg`. ``--config.train.updates=10`` then replaces a single value.
The result is frozen.

- `flags`: splits a command line into flags and reads their values.
- `loading`: runs a config file and applies the overrides.
- `settings`: the config as frozen dataclasses, with every relation between fields checked.
- `models`, `build`: make models, agents, judges and programs from settings.
- `stored`: writes and reads ``config.json``, and lists the fields in which two configs differ.
- `workdir`: checks whether a run may go on in a workdir.
- `command_line`: the flags of ``train``, ``evaluate``, ``export`` and ``plan``.
"""

from opd_jax.config.command_line import parse_command_line
from opd_jax.config.flags import given_fields
from opd_jax.config.loading import load, parse_arg
from opd_jax.config.stored import check_same_run, differences, read_stored, to_json

__all__ = [
    "check_same_run",
    "differences",
    "given_fields",
    "load",
    "parse_arg",
    "parse_command_line",
    "read_stored",
    "to_json",
]
