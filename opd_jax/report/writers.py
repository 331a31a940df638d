"""What a run tells: JSON lines, TensorBoard events, a summary, progress and tables.

In a run of several processes only process 0 writes: the writers take ``write=False`` elsewhere and
do nothing.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class JsonlWriter:
    """Writes one JSON object a line, one line an update, and resumes without gap or duplicate.

    A line reaches the operating system before `write` returns, so it survives a kill of the
    process. A run that writes the line of step s before it saves checkpoint s therefore finds every
    line up to s when it resumes there.

    Args:
      path: the file, usually ``metrics.jsonl`` in the workdir; its directory is created.
      resume_step: the step of the checkpoint resumed from: lines of later steps are dropped, as is
        a last line torn by a kill. None starts an empty file.
      write: false on all processes but one; the object then does nothing.

    Raises:
      ValueError: a line other than the last is not a JSON object with a `step`.
    """

    def __init__(self, path: str | Path, *, resume_step: int | None, write: bool):
        self._file = None
        if not write:
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else _lines_until(path, resume_step)
        _replace_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends ``{"step": step, **values}``; NaN and infinity, which JSON lacks, become null."""
        if self._file is not None:
            line = json.dumps(_jsonable({"step": step, **values}), allow_nan=False)
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class EventWriter:
    """Writes the scalars of `JsonlWriter` as a TensorBoard event file, on disk after each `write`.

    Args:
      directory: where event files go; it is created. Every run or resumption adds one file.
      resume_step: as in `JsonlWriter`; TensorBoard hides the events of later steps written before.
      write: false on all processes but one; the object then does nothing.
    """

    def __init__(self, directory: str | Path, *, resume_step: int | None, write: bool):
        self._file = None
        if not write:
            return
        # Imported late, since it takes seconds. Its `SummaryWriter` hands events to a thread and
        # cannot wait for it, so a kill would lose steps that a checkpoint already covers.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        Path(directory).mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(Path(directory) / "events"))
        if resume_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._file.write_event(Event(step=resume_step + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes every finite number of `values`; entry k of a list goes to ``name/k``."""
        if self._file is None:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        numbers = {}
        for name, value in _jsonable(values).items():
            parts = enumerate(value) if isinstance(value, list) else [(None, value)]
            for k, part in parts:
                if isinstance(part, (int, float)):
                    numbers[name if k is None else f"{name}/{k}"] = part
        points = [Summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()]
        event = Event(step=step, wall_time=time.time(), summary=Summary(value=points))
        self._file.write_event(event)
        self._file.flush()

    def close(self) -> None:
        """Closes the event file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def write_summary(path: str | Path, results: Mapping[str, Any], *, write: bool) -> None:
    """Merges `results` into a JSON file; readers see the old file or the new one, never a part.

    Args:
      path: usually ``summary.json`` in the workdir.
      results: nested mappings, such as ``{"eval": {who: {split: {"success": ..., ...}}}}``.
        Those of the first three levels merge key by key; what lies deeper, the figures of one
        evaluation, replaces what was there as a whole. Non-finite numbers become null.
      write: false on all processes but one; then nothing happens.

    Raises:
      ValueError: the file exists and does not hold a JSON object.
    """
    if not write:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = _merge(read_summary(path), _jsonable(results), levels=3)
    _replace_text(path, json.dumps(merged, indent=2, allow_nan=False) + "\n")


def read_summary(path: str | Path) -> dict[str, Any]:
    """What `write_summary` has written so far; empty without a file.

    Raises:
      ValueError: the file does not hold a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` must hold a JSON object and does not; move it away")
    return content


def progress_line(
    *,
    step: int,
    total_steps: int,
    loss: float,
    success: float | None,
    verdicts: Mapping[str, float] | None,
    tokens_per_s: float | None,
    seconds_per_step: float,
) -> str:
    """One line about an update, for a person.

    Args:
      step: updates done.
      total_steps: updates of the whole run.
      loss: nats a student token.
      success: share of the batch's episodes that succeeded, in [0, 1]; None where none was run.
      verdicts: name to share of turns, in [0, 1]; None or empty where nothing was judged.
      tokens_per_s: throughput shown; None where none was measured.
      seconds_per_step: wall time of an update, from which the time left is estimated.

    Returns:
      Such as ``"12/200  loss 0.4321  success 25%  skip 50% weak 20%  1.2k tok/s  3m08s left"``.
    """
    parts = [f"{step:>{len(str(total_steps))}}/{total_steps}", f"loss {loss:.4f}"]
    if success is not None:
        parts.append(f"success {success:.0%}")
    if verdicts:
        parts.append(" ".join(f"{name} {share:.0%}" for name, share in verdicts.items()))
    if tokens_per_s is not None:
        parts.append(f"{_thousands(tokens_per_s)} tok/s")
    parts.append(f"{_duration(seconds_per_step * (total_steps - step))} left")
    return "  ".join(parts)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Formats rows as a Markdown table whose source is aligned too.

    Args:
      rows: each a mapping from column to cell; a missing cell or None shows as ``-``. A float shows
        four significant digits, anything else as ``str``.
      columns: headings, in order. A column of numbers only is aligned to the right.

    Returns:
      The table, without a final newline.
    """
    aligned = []
    for column in columns:
        values = [row.get(column) for row in rows]
        numeric = all(isinstance(value, (int, float, type(None))) for value in values)
        cells = [_cell(value) for value in values]
        width = max(3, len(_cell(column)), *map(len, cells))
        rule = "-" * (width - 1) + (":" if numeric else "-")
        lines = [_cell(column), rule, *cells]
        aligned.append([line.rjust(width) if numeric else line.ljust(width) for line in lines])
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*aligned, strict=True))


def _lines_until(path: Path, last_step: int) -> list[str]:
    """Lines of a JSON-lines file with `step` at most `last_step`, without a torn last one."""
    if not path.exists():
        return []
    # What a complete file has after its last newline is the empty string.
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


def _replace_text(path: Path, text: str) -> None:
    """Writes a file so that a kill or a crash leaves the old content or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _jsonable(value: Any) -> Any:
    """Turns arrays and numpy or jax scalars into JSON types, and non-finite numbers into None."""
    if isinstance(value, Mapping):
        return {str(name): _jsonable(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(part) for part in value]
    if hasattr(value, "tolist"):
        return _jsonable(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _merge(old: dict[str, Any], new: dict[str, Any], levels: int) -> dict[str, Any]:
    merged = dict(old)
    for name, value in new.items():
        both = levels > 1 and isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value, levels - 1) if both else value
    return merged


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _thousands(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
