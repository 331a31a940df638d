"""The config in a workdir: written as JSON, read back, and compared with the one given now."""

import json
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

from opd_jax.config.loading import flatten


def to_json(config: ConfigDict) -> str:
    """Writes a config as indented JSON text, the content of ``config.json`` in a workdir.

    Raises:
      ValueError: a value JSON cannot hold (a function, infinity, an array); the field is named.
    """
    for field, value in flatten(config).items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(
                f"config field `{field}` must be a bool, finite number, string, None or a tuple of "
                f"these to be stored as JSON; got {value!r}"
            ) from None
    return json.dumps(config.to_dict(), indent=2, allow_nan=False) + "\n"


def from_json(text: str) -> FrozenConfigDict:
    """Reads what `to_json` wrote; `differences` between the two is empty.

    Raises:
      ValueError: the text is not one JSON object.
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"stored config is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"stored config must be a JSON object, got {type(fields).__name__}")
    return FrozenConfigDict(fields)


def read_stored(path: Path) -> FrozenConfigDict:
    """The config in the ``config.json`` of a workdir.

    Raises:
      ValueError: the file does not hold one; names it.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`{path}`: {error}; choose another --workdir") from None


def check_same_run(config: ConfigDict, workdir: Path, *, binds: Callable[[str], bool]) -> None:
    """Makes sure that a workdir's ``config.json``, if there is one, agrees with `config`.

    Args:
      config: given now.
      workdir: of a run.
      binds: as in `differences`.

    Raises:
      ValueError: they differ; names the workdir and every field.
    """
    path = workdir / "config.json"
    if path.exists() and (changed := differences(read_stored(path), config, binds=binds)):
        raise ValueError(
            f"workdir `{workdir}` holds a run with another config ({'; '.join(changed)}); "
            "choose another --workdir, or the config it was started with"
        )


def store(config: ConfigDict, workdir: Path) -> None:
    """Writes ``config.json``; whoever reads it finds the old file or the new one."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    partial = path.with_name("config.json.tmp")
    partial.write_text(to_json(config), encoding="utf-8")
    partial.replace(path)


def differences(saved: ConfigDict, now: ConfigDict, *, binds: Callable[[str], bool]) -> list[str]:
    """Lists the fields in which two configs differ, each as ``"field: saved -> now"``.

    Args:
      saved: the config the run was started with.
      now: the config given this time.
      binds: whether a field, by its dotted name, has to be the same.

    Returns:
      One line a field, sorted by field; empty when the two agree. A field that only one side has
      shows as ``absent`` on the other.
    """
    old, new = flatten(saved), flatten(now)
    lines = []
    for field in sorted(old.keys() | new.keys()):
        before, after = old.get(field, _ABSENT), new.get(field, _ABSENT)
        if before != after and binds(field):
            lines.append(f"{field}: {before!r} -> {after!r}")
    return lines


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()
