"""Reads the command lines of ``python -m opd_jax.train`` and its siblings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from ml_collections import ConfigDict, FrozenConfigDict

from opd_jax.config.flags import closest, flag_pairs, read_value, written
from opd_jax.config.loading import flatten, load, override
from opd_jax.config.stored import closest_run, read_stored
from opd_jax.runtime import bucket


@overload
def parse_command_line(
    argv: Sequence[str],
    *,
    usage: str,
    needs_config: Literal[True] = True,
    or_stored: bool = False,
    **flags: Any,
) -> tuple[FrozenConfigDict, Path, dict[str, Any]]: ...


@overload
def parse_command_line(
    argv: Sequence[str], *, usage: str, needs_config: Literal[False], **flags: Any
) -> tuple[None, Path, dict[str, Any]]: ...


@overload
def parse_command_line(
    argv: Sequence[str], *, usage: str, needs_workdir: Literal[False], **flags: Any
) -> tuple[FrozenConfigDict, None, dict[str, Any]]: ...


def parse_command_line(
    argv: Sequence[str],
    *,
    usage: str,
    needs_config: bool = True,
    needs_workdir: bool = True,
    or_stored: bool = False,
    **flags: Any,
) -> tuple[FrozenConfigDict | None, Path | None, dict[str, Any]]:
    """Reads the command line of ``python -m opd_jax.train`` and its siblings.

    Flags are written ``--name=value`` or ``--name value``; a bool one may stand alone: ``--name``.
    ``--help`` prints `usage` and the flags, and exits with status 0. With ``--config`` it also
    prints every field of that config.

    Args:
      argv: the arguments after the program name.
      usage: text that ``--help`` prints first.
      needs_config: true requires ``--config``, false refuses it.
      needs_workdir: true requires ``--workdir``, false refuses it.
      or_stored: without ``--config``, take the config that the workdir holds.
      **flags: further flags of this command. A tuple of strings lists the accepted values; the
        first is the default. Any other value is a default of its type. A type (`str`, `int`, ...)
        makes the flag required.

    Returns:
      (config, workdir, flags): the frozen config, the workdir (each None if not needed), and the
      value of every flag in `flags`.

    Raises:
      ValueError: an unknown, missing or repeated flag, or a value that it does not take. The caller
        runs in `runtime.exits.reported`.
    """
    required = ["config"] * needs_config + ["workdir"] * needs_workdir
    known = [*required, *flags]
    # Removed first: it takes no value.
    wants_help = any(word in ("--help", "-h") for word in argv)
    argv = [word for word in argv if word not in ("--help", "-h")]
    given: dict[str, str] = {}
    overrides = []
    switches = [name for name, default in flags.items() if isinstance(default, bool)]
    for name, text in flag_pairs(argv, switches=switches):
        if name.startswith("config.") and needs_config:
            overrides.append(f"--{name}={text}")
            continue
        if name not in known:
            raise ValueError(f"unknown flag `--{name}`{closest(name, known)}; see --help")
        if name in given:
            raise ValueError(f"flag `--{name}` is given twice; give it once")
        given[name] = text
    if wants_help:
        print(_help_text(usage, known, flags, given.get("config"), overrides, or_stored=or_stored))
        raise SystemExit(0)
    required += [name for name, default in flags.items() if isinstance(default, type)]
    for name in required:
        if not given.get(name) and not (name == "config" and or_stored):
            raise ValueError(f"flag `--{name}` is required: add `--{name}={_placeholder(name)}`")
    extra = {name: _flag_value(name, default, given.get(name)) for name, default in flags.items()}
    workdir = bucket.place(given["workdir"], name="--workdir") if needs_workdir else None
    config = None
    if given.get("config"):
        config = load(given["config"], overrides)
    elif needs_config and workdir:
        config = override(_stored(workdir), overrides)
    return config, workdir, extra


def _stored(workdir: Path) -> ConfigDict:
    """The config that a workdir holds."""
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(
            f"`{workdir}` holds no run: it has no config.json{closest_run(workdir)}; give a run's "
            f"workdir, or add `--config={_placeholder('config')}`"
        )
    return ConfigDict(read_stored(path))


def _flag_value(name: str, default: Any, text: str | None) -> Any:
    """Reads one extra flag of `parse_command_line`."""
    if isinstance(default, tuple):
        if text is not None and text not in default:
            raise ValueError(f"flag `--{name}` expects one of {', '.join(default)}; got `{text}`")
        return default[0] if text is None else text
    kind = default if isinstance(default, type) else type(default)
    return default if text is None else read_value(text, kind, f"flag `--{name}`")


def _placeholder(name: str) -> str:
    return {"config": "NAME[:arg]", "workdir": "DIR"}.get(name, name.upper())


def _help_text(
    usage: str,
    known: Sequence[str],
    flags: Mapping[str, Any],
    config_path: str | None,
    overrides: Sequence[str],
    *,
    or_stored: bool,
) -> str:
    lines = [usage.strip(), "", "flags:"]
    for name in known:
        default = flags.get(name, str)
        if isinstance(default, tuple):
            lines.append(f"  --{name}={'|'.join(default)}  (default {default[0]})")
        elif name == "config" and or_stored:
            lines.append(f"  --{name}={_placeholder(name)}  (default: the workdir's)")
        elif isinstance(default, type):
            lines.append(f"  --{name}={_placeholder(name)}  (required)")
        elif isinstance(default, bool):  # it may stand alone
            lines.append(f"  --{name}{'=false' if default else ''}  (default {default!r})")
        else:
            lines.append(f"  --{name}={_placeholder(name)}  (default {default!r})")
    if "config" in known:
        lines.append("  --config.FIELD=VALUE  replaces one field of the config")
    if config_path:
        lines += ["", f"fields of {config_path}:"]
        fields = flatten(load(config_path, overrides))
        for field, value in fields.items():
            text = written(value)
            if text is None:
                lines.append(f"  config.{field} = {value}  (set in the config file)")
            else:
                lines.append(f"  --config.{field}={text}")
    return "\n".join(lines)
