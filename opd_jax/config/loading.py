"""Loads a config file with its argument and overrides, as a frozen config."""

import importlib
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

import opd_jax
from opd_jax.config.flags import closest, flag_pairs, read_optional, read_sequence, read_value
from opd_jax.runtime.files import local_path

# A wheel holds the configs as `opd_jax.configs`. A checkout has them beside the package.
_CHECKOUT = Path(opd_jax.__path__[0]).parent
if (_CHECKOUT / "configs" / "quickstart.py").is_file():
    opd_jax.__path__.append(str(_CHECKOUT))


def parse_arg(arg: str | None, **defaults: bool | int | float | str) -> ConfigDict:
    """Reads the structural argument of a config file, such as ``"runlocal,student=1.7b"``.

    Args:
      arg: comma-separated names and ``name=value`` pairs. A bare name sets a bool to true. None or
        the empty string keeps every default.
      **defaults: the known names; each value gives the default and the type.

    Returns:
      A ConfigDict with exactly the names in `defaults`.

    Raises:
      ValueError: an unknown name, a name given twice, a bare name that is not a bool, or a value
        that is not of its default's type.
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


def load(name: str, overrides: Sequence[str]) -> FrozenConfigDict:
    """Builds the config of one experiment.

    Args:
      name: ``NAME`` of a config in `opd_jax.configs`, or ``path/to/NAME.py``; a colon and an
        argument may follow.
      overrides: ``--config.x.y=value``, or ``--config.x.y`` followed by ``value``. A value is read
        as the type of the default that it replaces. An int is accepted for a float; ``1,2,3`` or
        ``(1,2,3)`` is a tuple. The last override of a field wins.

    Returns:
      The config with the overrides applied, immutable; lists have become tuples.

    Raises:
      ValueError: no such config, no `get_config` in it, an unknown field, a value of another type,
        or one that a comparison would undo.
    """
    return override(_build(name), overrides)


def override(config: ConfigDict, overrides: Sequence[str]) -> FrozenConfigDict:
    """The config with the overrides applied, as `load` does; `config` itself is changed too."""
    given = []
    for flag, text in flag_pairs(overrides):
        if not flag.startswith("config."):
            raise ValueError(f"a config override starts with `--config.`; got `--{flag}`")
        given.append(flag.removeprefix("config."))
        _override(config, given[-1], text)
    _check_kept(config, given)
    return FrozenConfigDict(config)


def _check_kept(config: ConfigDict, given: Sequence[str]) -> None:
    """Checks that no method of a comparison sets a given field to another value."""
    methods = config.compare.methods if "compare" in config else ()
    fields = flatten(config)
    for method in methods:
        own = flatten(config.compare.variants.get(method, ConfigDict())) | {"seed": None}
        undone = [field for field in given if field in own and own[field] != fields[field]]
        if undone:
            raise ValueError(
                f"`--config.{undone[0]}`: a comparison sets it itself, as in {method!r}; "
                "change `compare.variants` (`compare.seeds` for the seed) in the config file, or "
                "run one method at a time"
            )


def _build(text: str) -> ConfigDict:
    """Runs `get_config(arg)` of the config that `NAME[:arg]` or `path/to/NAME.py[:arg]` names."""
    match = re.fullmatch(r"(\w+|.+?\.py)(?::(.*))?", text)
    if not match:
        raise ValueError(
            "`--config` expects the name of a config or the path of a Python file, such as "
            f"`quickstart:runlocal` or `path/to/mine.py`; got `{text}`"
        )
    name, arg = match[1], match[2]
    shipped = not name.endswith(".py")
    path = _shipped() / f"{name}.py" if shipped else local_path(name, name="--config")
    if not path.is_file():
        there = _config_names(path.parent)

        def shown(stem: str) -> str:
            return str(path.with_name(f"{stem}.py")) if name.endswith(".py") else stem

        near = closest(path.stem, there, shown=shown) or closest(
            path.stem, _config_names(_shipped())
        )
        raise ValueError(
            f"config `{name}` does not exist{near}; configs in "
            f"`{path.parent}`: {', '.join(there) or 'none'}"
        )
    # As with `python FILE`: a config may import its neighbours.
    if (folder := str(path.parent.resolve())) not in sys.path:
        sys.path.insert(0, folder)
    module = runpy.run_path(str(path), run_name=f"experiment_{path.stem}")
    if "get_config" not in module:
        raise ValueError(f"config file `{path}` must define `get_config(arg)`; it does not")
    config = module["get_config"](arg)
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise ValueError(f"`get_config` in `{path}` must return a ConfigDict, got {kind}")
    return config.lock()


def _shipped() -> Path:
    """The folder of `opd_jax.configs`."""
    return Path(next(iter(importlib.import_module("opd_jax.configs").__path__)))


def _config_names(folder: Path) -> list[str]:
    """Names of the configs in a folder; files that they share are no configs."""
    files = sorted(folder.glob("*.py"))
    return [file.stem for file in files if "def get_config(" in file.read_text("utf-8")]


def _override(config: ConfigDict, field: str, text: str) -> None:
    """Replaces one leaf of `config` in place; reads `text` as the leaf's type."""
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
