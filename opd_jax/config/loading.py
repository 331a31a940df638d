"""A config file, its argument and overrides, to a frozen config."""

import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from opd_jax.config.flags import closest, flag_pairs, read_optional, read_sequence, read_value


def parse_arg(arg: str | None, **defaults: bool | int | float | str) -> ConfigDict:
    """Reads the structural argument of a config file, such as ``"runlocal,student=1.7b"``.

    Args:
      arg: comma-separated names and ``name=value`` pairs. A bare name sets a bool to true. None or
        the empty string leaves every default.
      **defaults: the known names; each value gives the default and the type.

    Returns:
      A ConfigDict with exactly the names in `defaults`.

    Raises:
      ValueError: an unknown name, a name given twice, a bare name that is not a bool, or a value
        that does not read as the type of its default.
    """
    parsed = dict(defaults)
    seen = set()
    for part in filter(None, (piece.strip() for piece in (arg or "").split(","))):
        name, equals, text = (side.strip() for side in part.partition("="))
        if name not in defaults:
            known = ", ".join(f"`{known}`" for known in sorted(defaults)) or "none"
            raise ValueError(f"unknown config argument `{name}`; known arguments: {known}")
        if name in seen:
            raise ValueError(f"config argument `{name}` is given twice in `{arg}`; give it once")
        seen.add(name)
        if not equals and not isinstance(defaults[name], bool):
            kind = type(defaults[name]).__name__
            raise ValueError(f"config argument `{name}` needs a value: write `{name}=<{kind}>`")
        label = f"config argument `{name}`"
        parsed[name] = read_value(text, type(defaults[name]), label) if equals else True
    return ConfigDict(parsed)


def load(path_with_arg: str, overrides: Sequence[str]) -> FrozenConfigDict:
    """Builds the config of one experiment.

    Args:
      path_with_arg: ``path/to/NAME.py`` or ``path/to/NAME.py:arg``.
      overrides: ``--config.x.y=value``, or ``--config.x.y`` followed by ``value``. A value is read
        as the type of the default it replaces; an int literal is accepted for a float, ``1,2,3``
        or ``(1,2,3)`` for a tuple. The last one wins.

    Returns:
      The config with the overrides applied, immutable; lists have become tuples.

    Raises:
      ValueError: no such file, no `get_config` in it, an unknown field, or a value of another type.
    """
    config = _build(path_with_arg)
    for name, text in flag_pairs(overrides):
        if not name.startswith("config."):
            raise ValueError(f"a config override starts with `--config.`; got `--{name}`")
        _override(config, name.removeprefix("config."), text)
    return FrozenConfigDict(config)


def _build(path_with_arg: str) -> ConfigDict:
    """Runs `get_config(arg)` of the file named in ``path.py[:arg]``."""
    match = re.fullmatch(r"(.+?\.py)(?::(.*))?", path_with_arg)
    if not match:
        raise ValueError(
            f"`--config` expects a Python file, `configs/NAME.py[:arg]`; got `{path_with_arg}`"
        )
    path, arg = Path(match[1]), match[2]
    if not path.is_file():
        there = sorted(file.name for file in path.parent.glob("*.py"))
        raise ValueError(
            f"config file `{path}` does not exist{closest(path.name, there)}; "
            f"files in `{path.parent}`: {', '.join(there) or 'none'}"
        )
    with _siblings_importable(path.parent):
        module = runpy.run_path(str(path), run_name=f"experiment_{path.stem}")
        if "get_config" not in module:
            raise ValueError(f"config file `{path}` must define `get_config(arg)`; it does not")
        config = module["get_config"](arg)
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise ValueError(f"`get_config` in `{path}` must return a ConfigDict, got {kind}")
    return config.lock()


@contextmanager
def _siblings_importable(folder: Path) -> Iterator[None]:
    """A config may build on another one beside it, which is forgotten again afterwards.

    A config in another folder may have a base of the same name.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        files = {str(file) for file in folder.glob("*.py")}
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) in files:
                del sys.modules[name]


def _override(config: ConfigDict, field: str, text: str) -> None:
    """Replaces one leaf of `config` in place, reading `text` as the type already there."""
    *groups, leaf = field.split(".")
    node = config
    for group in groups:
        node = node.get(group) if isinstance(node, ConfigDict) else None
    if not isinstance(node, ConfigDict) or leaf not in node:
        near = closest(field, list(flatten(config)))
        near = near or "; top-level fields: " + ", ".join(f"`{name}`" for name in config)
        raise ValueError(f"unknown config field `{field}`{near}")
    default = node[leaf]
    if isinstance(default, ConfigDict):
        inside = ", ".join(f"`{field}.{name}`" for name in default)
        raise ValueError(f"config field `{field}` is a group; set one of {inside}")
    if isinstance(default, (tuple, list)):
        value: Any = read_sequence(text, default, f"config field `{field}`")
    elif default is None:
        value = read_optional(text, node.get_type(leaf), f"config field `{field}`")
    else:
        value = read_value(text, type(default), f"config field `{field}`")
    node[leaf] = value


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Maps the dotted name of every leaf to its value; an empty group is a leaf."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict) and len(value):
            leaves |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, ConfigDict):
            leaves[prefix + name] = {}
        else:
            leaves[prefix + name] = tuple(value) if isinstance(value, list) else value
    return leaves
