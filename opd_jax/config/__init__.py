"""Configs: a Python file for each experiment, from a command line to typed settings.

A file ``NAME.py`` defines ``get_config(arg)``, which returns an ``ml_collections.ConfigDict`` with
every default. ``--config=NAME:runlocal,student=1.7b`` passes the text after the colon as ``arg``,
and the file reads it with `parse_arg`. ``--config.train.updates=10`` then replaces a single value.
The result is frozen: nothing can change it once the run has started.

- `flags`: words of a command line, and the typed values in them.
- `loading`: a config by name or path, its argument and overrides, to a frozen config.
- `settings`: the config as frozen dataclasses, with every relation between fields checked.
- `models`, `build`: from settings to live objects.
- `stored`: ``config.json`` in a workdir, and in which fields two configs differ.
- `workdir`: whether a run may go on in a workdir.
- `command_line`: what ``train``, ``evaluate`` and ``export`` share.
"""

from opd_jax.config.command_line import parse_command_line
from opd_jax.config.flags import given_fields
from opd_jax.config.loading import load, parse_arg
from opd_jax.config.stored import check_same_run, differences, from_json, read_stored, to_json
from opd_jax.runtime.exits import fail

__all__ = [
    "check_same_run",
    "differences",
    "fail",
    "from_json",
    "given_fields",
    "load",
    "parse_arg",
    "parse_command_line",
    "read_stored",
    "to_json",
]
