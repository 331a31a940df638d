"""Checkpoints of a training run: everything that resuming needs, saved atomically.

Orbax writes each checkpoint into a temporary directory and renames it when complete. A process that
is killed at any moment loses at most the save in progress. On disk a checkpoint is
``DIRECTORY/STEP/{state,meta}``: arrays in ``state``, one JSON object in ``meta`` (cursors,
counters, host-side random state). In a bucket, where nothing can be renamed, the object
``STEP/commit_success.txt`` is written last. Every process writes its own shards there.
"""

import functools
import json
import logging
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from opd_jax.runtime import bucket, processes, progress
from opd_jax.runtime.exits import DISK, WorldFailed, explain, reading
from opd_jax.runtime.fields import WORLD, affects, check_choice, check_within

# An error of the storage layer can be pages long; its beginning names the file and the defect.
_MAX_CAUSE_CHARS = 300
# The object that makes a checkpoint in a bucket complete.
_COMMITTED = re.compile(r"(\d+)/commit_success\.txt")


# Figures by which a checkpoint may be the best, and whether more is better.
BEST = {"success": True, "score": True, "turns": False, "repeated": False, "failed": False}


@dataclass(frozen=True)
class CheckpointSettings:
    """When a run saves.

    Attributes:
      every: updates between two checkpoints.
      keep: number of checkpoints to keep, the newest.
      best: a figure; the checkpoint that has the best one is kept too. "" for none.
    """

    every: int = field(metadata=affects(WORLD))
    keep: int = field(metadata=affects(WORLD))
    best: str = field(metadata=affects(WORLD))

    def __post_init__(self):
        check_within(1, every=self.every, keep=self.keep)
        check_choice(("", *BEST), best=self.best)


def saved_steps(directory: Path) -> list[int]:
    """The steps of the complete checkpoints in a directory, ascending; no save under way counts."""
    if bucket.url_of(directory):
        found = (_COMMITTED.fullmatch(name) for name in bucket.names(directory))
        return sorted(int(match[1]) for match in found if match)
    names = (path.name for path in directory.glob("*/") if path.name.isdecimal())
    return sorted(map(int, names))


def check_saves(directory: Path) -> None:
    """Checks that checkpoints saved in a directory, which may be absent, could be restored.

    Raises:
      ValueError: orbax would take its path for a pattern, and lose every array that it saves.
    """
    if found := re.search(r"[*?[]", str(directory.resolve())):
        raise ValueError(
            f"`{directory.resolve()}` has a `{found[0]}`, and checkpoints in such a path cannot be "
            "restored; choose another --workdir"
        )


class _AnotherRun(ValueError):
    """The files are intact but hold other arrays than the caller expects."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: their directory, which the first save creates. All processes must see the same
        one.
      keep: the number of checkpoints to keep, at least 1. An older one is deleted once a newer one
        is complete, unless it is `best`.

    Attributes:
      best: the step of a checkpoint that is kept besides the newest; None: there is none.
    """

    def __init__(self, directory: str | Path, *, keep: int):
        self.directory = Path(directory).resolve()
        self.best: int | None = None
        self._keep = keep
        self._opened: tuple[Any, Any] | None = None
        self._has_saved = False

    def save(self, step: int, arrays: Any, meta: Mapping[str, Any]) -> None:
        """Saves `arrays` and `meta` as checkpoint `step`.

        Returns when the arrays are copied to the host; from then on they may be donated. A thread
        writes them. If it fails (a full disk), the next `save` or `wait` raises its error; one of
        several processes ends at once (`processes.end`).

        Args:
          step: greater than all steps saved so far.
          arrays: pytree of jax arrays of any dtype, typed PRNG keys included. Every process passes
            the same global arrays.
          meta: a JSON object. Integers may have any size.

        Raises:
          ValueError: `step` is not newer than the newest checkpoint, or `meta` is not JSON.
        """
        if processes.is_first():
            if not self._has_saved:
                self._remove_leftovers()
            bucket.upload(self.directory.parent)  # the lines of what is saved come first
        self._has_saved = True
        manager, ocp = self._manager()
        newest = manager.latest_step()
        if newest is not None and step <= newest:
            raise ValueError(
                f"`step` must be greater than {newest}, the newest checkpoint in "
                f"`{self.directory}`; got {step}"
            )
        try:
            json.dumps(meta)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`meta` must be a JSON object: {error}") from None
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(dict(meta))
        )
        manager.save(step, args=items, force=True)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None. Waits for a save in progress."""
        self.wait()
        return max(saved_steps(self.directory), default=None)

    def restore(
        self, step: int, abstract: Any, *, partial: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """Reads checkpoint `step`: the same bits that were saved.

        Args:
          step: a saved step.
          abstract: pytree like the saved one, of arrays or `jax.ShapeDtypeStruct`s. Shardings may
            differ from those of the saved arrays. A leaf without sharding becomes a numpy array on
            the host. Numpy has no PRNG keys, so those go to the first device.
          partial: `abstract` is a part of the saved tree under the same keys; read only that.

        Returns:
          (arrays, meta): arrays in the structure of `abstract`, and the JSON object.

        Raises:
          ValueError: there is no such checkpoint; names, shapes or dtypes of its arrays differ from
            `abstract`; or its files cannot be read. Nothing on disk is changed. The message names
            the checkpoint before it; the user decides whether to resume from that one.
          WorldFailed: its files cannot be read now.
        """
        self.wait()
        if step not in (steps := saved_steps(self.directory)):
            raise ValueError(f"no checkpoint {step} in `{self.directory}`; saved steps: {steps}")
        return self._restore(step, abstract, partial)

    def _restore(self, step: int, abstract: Any, partial: bool) -> tuple[Any, dict[str, Any]]:
        abstract = jax.tree.map(_wanted, abstract)
        try:
            with progress.doing(f"reading checkpoint {step}"), reading(self.directory / str(step)):
                self._check_match(step, abstract, partial)
                return self._read(step, abstract, partial)
        except (_AnotherRun, WorldFailed):
            raise
        except Exception as error:
            if processes.is_lost(error):
                raise
            # Corrupt bytes surface as any of a dozen exception types.
            raise ValueError(self._advice(step, _one_line(error))) from None

    def restore_latest(
        self, abstract: Any, *, partial: bool = False
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores the newest checkpoint as (step, arrays, meta); returns None if there is none.

        Arguments and errors as in `restore`.
        """
        # All processes take the step that process 0 sees, and list nothing themselves: a network
        # file system may show them an older state of the directory.
        self.wait()
        step = processes.first(self.latest() if processes.is_first() else None)
        return None if step is None else (step, *self._restore(step, abstract, partial))

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """The shape of each array of checkpoint `step` by its path, as `params/embed`.

        Empty if their list cannot be read; `restore` then says so.
        """
        try:
            tree = self._manager()[0].item_metadata(step)["state"].tree
        except Exception:  # as in `restore`
            return {}
        return {_path(path): tuple(leaf.shape) for path, leaf in jax.tree.leaves_with_path(tree)}

    def wait(self) -> None:
        """Returns when every save is complete on disk. Raises the error of a failed save."""
        if self._opened is not None:
            with progress.doing("waiting for a checkpoint to be saved"):
                self._opened[0].wait_until_finished()

    def close(self) -> None:
        """Waits for saves and stops the writing threads. The object may be used again."""
        if self._opened is not None:
            self._opened[0].close()
            self._opened = None

    def _manager(self) -> tuple[Any, Any]:
        """Opens the directory at its first use: importing orbax takes almost a second."""
        if self._opened is None:
            import orbax.checkpoint as ocp

            _quieten_orbax()
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self, enable_async_checkpointing=True
            )
            handlers = {
                # Writes the format of the standard handler, but can restore a part of a tree.
                "state": ocp.PyTreeCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            }
            where = bucket.url_of(self.directory) or self.directory
            manager = ocp.CheckpointManager(where, options=options, item_handlers=handlers)
            self._opened = (manager, ocp)
        return self._opened

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which of the checkpoints, ascending, stay: orbax's `PreservationPolicy`."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        return [step in (*steps[-self._keep :], self.best) for step in steps]

    def _remove_leftovers(self) -> None:
        """Removes what killed saves left. Only who saves does, so it is nobody's save under way."""
        if bucket.url_of(self.directory):
            begun = {name.partition("/")[0] for name in bucket.names(self.directory)}
            for name in begun - set(map(str, saved_steps(self.directory))):
                bucket.remove(self.directory / name)
        for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def _check_match(self, step: int, abstract: Any, partial: bool) -> None:
        """Compares names, shapes and dtypes before reading: orbax would cast dtypes silently."""
        metadata = self._manager()[0].item_metadata(step)["state"]
        if metadata is None:
            raise ValueError("the list of its arrays, `state/_METADATA`, is missing")
        saved, expected = _by_name(metadata.tree), _by_name(abstract)
        for name in sorted(expected.keys() if partial else expected.keys() | saved.keys()):
            found, wanted = saved.get(name, "absent"), expected.get(name, "absent")
            if found != wanted:
                raise _AnotherRun(
                    f"checkpoint `{self.directory / str(step)}` belongs to another model or "
                    f"optimizer: array `{name}` is {found} there, {wanted} was expected; give the "
                    "config it was saved with, or another `--workdir`"
                )

    def _read(self, step: int, abstract: Any, partial: bool) -> tuple[Any, dict[str, Any]]:
        manager, ocp = self._manager()
        arrays = ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=partial,
        )
        items = ocp.args.Composite(state=arrays, meta=ocp.args.JsonRestore())
        restored = manager.restore(step, args=items)
        return restored["state"], restored["meta"]

    def _advice(self, step: int, problem: str) -> str:
        broken = self.directory / str(step)
        older = [other for other in saved_steps(self.directory) if other < step]
        if older:
            good = self.directory / str(older[-1])
            advice = f"to resume from the older checkpoint `{good}`, move `{broken}` away"
        else:
            advice = "there is no older checkpoint; start again with another `--workdir`"
        return (
            f"checkpoint `{broken}` cannot be restored ({problem}); nothing was changed; {advice}"
        )


def _wanted(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _by_name(tree: Any) -> dict[str, str]:
    """Path of each array -> its dtype and shape as text. PRNG keys count as their uint32 data."""
    arrays = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        arrays[_path(path)] = f"{leaf.dtype}{list(leaf.shape)}"
    return arrays


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _one_line(error: BaseException) -> str:
    # Orbax wraps the error of the storage layer, which names the file.
    cause = error.__cause__ or error
    text = " ".join(str(cause).split())
    text = text if len(text) <= _MAX_CAUSE_CHARS else text[:_MAX_CAUSE_CHARS] + "..."
    return text if type(cause) is ValueError else f"{type(cause).__name__}: {text}"


@functools.cache  # once a process
def _quieten_orbax() -> None:
    """Silences two reports of orbax that tell a user nothing.

    Orbax logs each step of each save, and errors that it also raises. And if an array cannot be
    read, it closes the event loop of the other reads. Each of those then reports the closed loop as
    an unraisable exception, possibly after `restore` has raised the error itself.
    """
    logging.getLogger("absl").addFilter(_not_orbax_chatter)
    logging.getLogger("asyncio").addFilter(_not_another_failed_write)
    report = sys.unraisablehook

    def report_others(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others


def _not_another_failed_write(record: logging.LogRecord) -> bool:
    """Of the writes that the disk fails, orbax raises the first; asyncio reports the others."""
    error = record.exc_info[1] if record.exc_info else None
    known = explain(error) if error else None
    return not known or known[1] != DISK


def _not_orbax_chatter(record: logging.LogRecord) -> bool:
    if "orbax" not in record.pathname:
        return True
    # An error with a traceback is one of its threads': `save` or `wait` raises it. Among several
    # processes they do not: the other processes wait for the thread, and it for them.
    error = record.exc_info[1] if record.exc_info else None
    if error and jax.process_count() > 1 and explain(error):
        processes.end(error)
    return record.levelno >= logging.ERROR and not error
