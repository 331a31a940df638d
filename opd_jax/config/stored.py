"""The config in a workdir: written as JSON, read back, and compared with the one given now."""

import json
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

from opd_jax.config.flags import closest
from opd_jax.config.loading import flatten
from opd_jax.runtime.files import read_json, replace_text


def to_json(config: ConfigDict) -> str:
    """A config as indented JSON text, the content of ``config.json`` in a workdir.

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


def read_stored(path: Path) -> FrozenConfigDict:
    """The config in a ``config.json``; `differences` from the one that was written is empty.

    Raises:
      ValueError: the file does not hold one; names it.
    """
    return FrozenConfigDict(read_json(path))


def closest_run(workdir: Path) -> str:
    """Names existing workdirs that are spelt like an absent one, for an error; "" if none is."""
    above = next((folder for folder in workdir.parents if folder.is_dir()), Path())
    inside = [folder for folder in (above, workdir) if folder.is_dir()]
    runs = {
        str(found.parent)
        for folder in inside
        for depth in ("*", "*/*", "*/*/*")
        for found in folder.glob(f"{depth}/config.json")
    }
    return closest(str(workdir), sorted(runs - {str(workdir)}))


def store(config: ConfigDict, workdir: Path) -> None:
    """Writes ``config.json``; readers see the old file or the new one."""
    workdir.mkdir(parents=True, exist_ok=True)
    replace_text(workdir / "config.json", to_json(config))


def check_same_run(config: ConfigDict, workdir: Path, *, binds: Callable[[str], bool]) -> None:
    """Checks that `config` agrees with the workdir's ``config.json``, if there is one.

    Raises:
      ValueError: they differ in a field that `binds`; names the workdir and every such field.
    """
    path = workdir / "config.json"
    if path.exists() and (changed := differences(read_stored(path), config, binds=binds)):
        longer = any(line.startswith("train.updates:") for line in changed)
        older = any("absent" in line for line in changed)
        raise ValueError(
            f"workdir `{workdir}` holds a run with another config ({'; '.join(changed)}); "
            "choose another --workdir, or the config it was started with"
            + ", in the version that knows these fields"
            * older
            + "; to train longer where `optimizer.schedule` is not constant, start a new run with "
            f"`--config.student=workdir:{workdir}`" * longer
        )


def differences(saved: ConfigDict, now: ConfigDict, *, binds: Callable[[str], bool]) -> list[str]:
    """The fields in which two configs differ, each as ``"field: saved -> now"``, sorted.

    A field that only one config has shows as ``absent`` in the other.

    Args:
      saved: the config the run was started with.
      now: the config given this time.
      binds: whether a field, by its dotted name, must be equal.
    """
    old, new = flatten(saved), flatten(now)
    lines = []
    for field in sorted(old.keys() | new.keys()):
        same = field in old and field in new and old[field] == new[field]
        if not same and binds(field):
            before, after = (repr(c[field]) if field in c else "absent" for c in (old, new))
            lines.append(f"{field}: {before} -> {after}")
    return lines
