"""Checkpoints of a training run: everything that resuming needs, committed together or not at all.

Orbax writes each checkpoint into a temporary directory and renames it when complete, so a process
killed at any moment loses at most the save in progress. On disk a checkpoint is
``DIRECTORY/STEP/{state,meta}``: arrays in ``state``, one JSON object in ``meta`` (cursors,
counters, host-side random state).
"""

import contextlib
import gc
import io
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from opd_jax.runtime import processes
from opd_jax.runtime.fields import WORLD, affects, check_within

# An error from the storage layer can run to pages; its head names the file and the defect.
_MAX_CAUSE_CHARS = 300
# Long enough for reads in flight to end; spent only before an error is raised.
_ABANDONED_READS_S = 0.3


@dataclass(frozen=True)
class CheckpointSettings:
    """When a run saves.

    Attributes:
      every: updates between two checkpoints.
      keep: how many checkpoints stay.
    """

    every: int = field(metadata=affects(WORLD))
    keep: int = field(metadata=affects(WORLD))

    def __post_init__(self):
        check_within(1, every=self.every, keep=self.keep)


class _AnotherRun(ValueError):
    """The files are sound but hold other arrays than the ones asked for."""


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them.

    Args:
      directory: where they live; created by the first save. All processes must see the same one.
      keep: how many checkpoints stay; older ones are deleted once a newer one is complete.

    Raises:
      ValueError: `keep` is less than one.
    """

    def __init__(self, directory: str | Path, *, keep: int):
        if keep < 1:
            raise ValueError(f"`keep` must be at least 1 checkpoint, got {keep}")
        self.directory = Path(directory).resolve()
        self._keep = keep
        self._opened: tuple[Any, Any] | None = None

    def save(self, step: int, arrays: Any, meta: Mapping[str, Any]) -> None:
        """Saves `arrays` and `meta` as checkpoint `step`.

        Returns once the arrays are copied to the host, which may then be donated; a
        thread writes them.
        An error of an earlier asynchronous save (a full disk) is raised here or in `wait`.

        Args:
          step: greater than every step saved so far.
          arrays: pytree of jax arrays of any dtype, typed PRNG keys included. Every process passes
            the same global arrays.
          meta: JSON object; integers may have any size.

        Raises:
          ValueError: `step` is not newer than the newest checkpoint, or `meta` is not JSON.
        """
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
        """Step of the newest complete checkpoint, None without one; waits for a save under way."""
        if not self.directory.is_dir():
            return None
        self.wait()
        return self._manager()[0].latest_step()

    def restore(
        self, step: int, abstract: Any, *, partial: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """Reads checkpoint `step`, bit for bit what was saved.

        Args:
          step: a saved step.
          abstract: pytree like the saved one, whose leaves have `shape`, `dtype` and `sharding`:
            arrays or `jax.ShapeDtypeStruct`. The sharding may differ from the one at saving time;
            a leaf without sharding becomes a numpy array on the host; but a key, which numpy does
            not have, goes to the first device.
          partial: `abstract` holds only some of what was saved, by the same keys; no other array is
            read.

        Returns:
          (arrays, meta): arrays in the structure of `abstract`, and the JSON object.

        Raises:
          ValueError: no such checkpoint, arrays missing, left over (unless `partial`), or of
            another shape or dtype, or files that cannot be read. Nothing on disk is changed, and no
            other checkpoint is taken instead: the message names the one before it, for the user to
            decide.
        """
        steps = [] if self.latest() is None else sorted(self._manager()[0].all_steps())
        if step not in steps:
            raise ValueError(f"no checkpoint {step} in `{self.directory}`; saved steps: {steps}")
        abstract = jax.tree.map(_wanted, abstract)
        problem = None
        with _held_back_stderr() as held:
            try:
                self._check_match(step, abstract, partial)
                arrays, meta = self._read(step, abstract, partial)
            except _AnotherRun:
                raise
            except Exception as error:
                if processes.is_lost(error):
                    raise
                # Corrupt bytes surface as any of a dozen exception types.
                problem = _one_line(error)
            if problem is not None:
                # Reads abandoned after the first error print tracebacks as they end, and as they
                # are collected; the exception that held them is gone by now.
                time.sleep(_ABANDONED_READS_S)
                gc.collect()
                held.truncate(0)
        if problem is not None:
            raise ValueError(self._advice(step, steps, problem))
        return arrays, meta

    def restore_latest(
        self, abstract: Any, *, partial: bool = False
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores the newest checkpoint as (step, arrays, meta), or gives None without one.

        Args:
          abstract: as in `restore`.
          partial: as in `restore`.

        Raises:
          ValueError: as `restore`.
        """
        # As one process sees the directory: others may be shown an older state of it.
        step = processes.first(self.latest())
        return None if step is None else (step, *self.restore(step, abstract, partial=partial))

    def wait(self) -> None:
        """Returns when every save is complete on disk; raises what a failed save raised."""
        if self._opened is not None:
            self._opened[0].wait_until_finished()

    def close(self) -> None:
        """Waits for saves and releases the writing threads; the object may be used again."""
        if self._opened is not None:
            self._opened[0].close()
            self._opened = None

    def _manager(self) -> tuple[Any, Any]:
        """Opens the directory at first use, since importing orbax takes most of a second."""
        if self._opened is None:
            import orbax.checkpoint as ocp

            # Orbax reports each step of each save as a log line.
            logging.getLogger("absl").addFilter(_not_orbax_chatter)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, enable_async_checkpointing=True
            )
            handlers = {
                # Writes what the standard handler writes, and can also read a part of it.
                "state": ocp.PyTreeCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            }
            manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
            self._opened = (manager, ocp)
        return self._opened

    def _check_match(self, step: int, abstract: Any, partial: bool) -> None:
        """Compares names, shapes and dtypes first: storage would cast another dtype silently."""
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

    def _advice(self, step: int, steps: list[int], problem: str) -> str:
        broken = self.directory / str(step)
        older = [other for other in steps if other < step]
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
    """Maps the path of every array to its dtype and shape as text, keys as the words they hold."""
    arrays = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        arrays[name] = f"{leaf.dtype}{list(leaf.shape)}"
    return arrays


def _one_line(error: BaseException) -> str:
    # A read error wraps the storage layer's own, which is the one that names the file.
    cause = error.__cause__ or error
    text = " ".join(str(cause).split())
    text = text if len(text) <= _MAX_CAUSE_CHARS else text[:_MAX_CAUSE_CHARS] + "..."
    return text if type(cause) is ValueError else f"{type(cause).__name__}: {text}"


@contextlib.contextmanager
def _held_back_stderr() -> Iterator[io.StringIO]:
    """Collects what is printed to stderr meanwhile, and prints what is left of it at the end."""
    held = io.StringIO()
    try:
        with contextlib.redirect_stderr(held):
            yield held
    finally:
        sys.stderr.write(held.getvalue())


def _not_orbax_chatter(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or "orbax" not in record.pathname
