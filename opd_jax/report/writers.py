"""The files that a run writes: JSON lines, TensorBoard events, and a summary."""

import json
import math
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax.runtime import processes
from opd_jax.runtime.files import (
    read_json,
    remove_temporaries,
    replace_bytes,
    replace_text,
)
from opd_jax.runtime.lazy import without_torch


class JsonlWriter:
    """Writes one JSON object per line and update. A resumed file has no gap and no duplicate.

    `write` hands the line to the operating system before it returns, so a kill of the process does
    not lose it. Write the line of step s before you save checkpoint s: a run that resumes from it
    then finds every line up to s.

    Args:
      path: the file, usually ``metrics.jsonl`` in the workdir; its directory is created.
      resume_step: the step of the checkpoint to resume from. Lines of later steps are dropped, and
        so is a last line that a kill cut short. None starts an empty file.

    Raises:
      ValueError: a line other than the last is not a JSON object with a `step`.
    """

    def __init__(self, path: Path, *, resume_step: int | None):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else _lines_until(path, resume_step)
        replace_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends ``{"step": step, **values}``; NaN and infinity, which JSON lacks, become null."""
        line = json.dumps(jsonable({"step": step, **values}), allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class EventWriter:
    """Writes the scalars of `JsonlWriter` to a TensorBoard event file; each `write` flushes it.

    Every start of a run adds one file to `directory`, which is created. Events of steps after
    `resume_step`, or all of them if it is None, are dropped from earlier files: they belong to
    updates that are done again. A TensorBoard that shows them already is told to hide them.
    """

    def __init__(self, directory: Path, *, resume_step: int | None):
        # Imported late: it takes seconds. Not its `SummaryWriter`: it writes from a thread that
        # nobody can wait for, so a kill would lose steps that a checkpoint already covers.
        with without_torch():
            from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        remove_temporaries(directory)
        for file in directory.glob("events.out.tfevents.*"):
            _cut_events(file, -1 if resume_step is None else resume_step)
        self._file = EventsWriter(str(directory / "events"))
        if resume_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._file.write_event(Event(step=resume_step + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes every finite number of `values`; entry k of a list goes to ``name/k``."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars: dict[str, Any] = {}
        for name, value in jsonable(values).items():
            if isinstance(value, list):
                scalars |= {f"{name}/{k}": part for k, part in enumerate(value)}
            else:
                scalars[name] = value
        points = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in scalars.items()
            if isinstance(value, (int, float))
        ]
        event = Event(step=step, wall_time=time.time(), summary=Summary(value=points))
        self._file.write_event(event)
        self._file.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._file.close()


def write_summary(path: Path, results: Mapping[str, Any]) -> None:
    """Merges `results` into a JSON file; readers see the old file or the new one, never a part.

    In a run of several processes only process 0 writes.

    Args:
      path: usually ``summary.json`` in the workdir.
      results: nested mappings, such as ``{"eval": {who: {split: {"success": ..., ...}}}}``. The
        first three levels merge key by key. Deeper levels, the figures of one evaluation, replace
        the old ones as a whole. Non-finite numbers become null.

    Raises:
      ValueError: the file exists and does not hold a JSON object.
    """
    if not processes.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = _merge(read_summary(path), jsonable(results), levels=3)
    replace_text(path, json.dumps(merged, indent=2, allow_nan=False) + "\n")


def read_summary(path: Path) -> dict[str, Any]:
    """What `write_summary` has written so far; {} if there is no file.

    Raises:
      ValueError: the file does not hold a JSON object.
    """
    return read_json(path) if path.exists() else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The updates in a `metrics.jsonl` so far, also while a run writes it; [] without a file.

    Raises:
      ValueError: a line other than the last is not a JSON object with a `step`.
    """
    return [json.loads(line) for line in _lines_until(path, math.inf)]


def _lines_until(path: Path, last_step: float) -> list[str]:
    """Lines of a JSON-lines file with `step` at most `last_step`, without a last one cut short."""
    if not path.exists():
        return []
    # A complete file ends with a newline, so its last part is empty.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise ValueError(
                f"line {number} of `{path}` is not a JSON object with a `step`; remove that line, "
                "or move the file away"
            ) from None
        if step <= last_step:
            kept.append(line + "\n")
    return kept


def _cut_events(file: Path, last_step: int) -> None:
    """Drops the events after `last_step` from a file, and a last one that a kill cut short.

    A record is its length (uint64) and a checksum (uint32) of that, an `Event`, and its checksum.
    """
    from tensorboardX.proto.event_pb2 import Event

    data, start, kept, scalars = file.read_bytes(), 0, [], False
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + 12 + length + 4
        if end > len(data):
            break
        try:
            event = Event.FromString(data[start + 12 : end - 4])
        except Exception:  # protobuf's own: the machine crashed, and nothing after it is whole
            break
        if event.step <= last_step:
            kept.append(data[start:end])
            scalars |= event.HasField("summary")
        start = end
    if not scalars:
        file.unlink()
    elif len(whole := b"".join(kept)) < len(data):
        replace_bytes(file, whole)


def jsonable(value: Any) -> Any:
    """Turns arrays and numpy or jax scalars into JSON types, and non-finite numbers into None."""
    if isinstance(value, Mapping):
        return {str(name): jsonable(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(part) for part in value]
    if hasattr(value, "tolist"):
        return jsonable(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _merge(old: dict[str, Any], new: dict[str, Any], levels: int) -> dict[str, Any]:
    merged = dict(old)
    for name, value in new.items():
        both = levels > 1 and isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value, levels - 1) if both else value
    return merged
