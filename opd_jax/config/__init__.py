"""Experiment configuration: one Python file an experiment, structure by argument, scalars by flag.

A file ``configs/NAME.py`` defines ``get_config(arg)`` and returns an ``ml_collections.ConfigDict``
that holds every default. ``configs/NAME.py:runlocal,student=1.7b`` passes the text after the colon
as ``arg`` (read there with `parse_arg`), and ``--config.train.updates=10`` then replaces a single
value. What comes out is frozen, so nothing can change it once the run has started.

- `flags`: words of a command line, and the typed values in them.
- `loading`: a file, its argument and overrides, to a frozen config.
- `settings`: the config as frozen dataclasses, with every relation between fields checked.
- `models`, `build`: from settings to live objects.
- `stored`: ``config.json`` in a workdir, and whether a run may go on under another config.
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
