"""What a run tells: metrics as (sum, count), JSON lines, TensorBoard events, progress and tables.

A ratio is kept as its sum and its count until it is written, so that the mean over micro-batches or
hosts is the mean over everything, not a mean of means. In a run of several processes every process
accumulates and only process 0 writes: the writers take ``write=False`` elsewhere and do nothing.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# 0.975 quantile of the standard normal distribution: two-sided 95 %.
_Z_95 = 1.959963984540054


class Metrics:
    """Accumulates named sums and counts.

    A value is a (sum, count) pair, or a plain scalar x, which stands for (x, 1). Sum and count may
    be arrays [K] of the same shape, for quantities by turn index. Sums are float64.
    """

    def __init__(self) -> None:
        self._totals: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, values: Mapping[str, Any]) -> None:
        """Adds each pair of `values` to the pair kept under its name.

        Args:
          values: name to a (sum, count) tuple or a scalar; jax and numpy arrays are accepted.

        Raises:
          ValueError: sum and count differ in shape, or in shape from what was added before.
        """
        for name, value in values.items():
            total, count = value if isinstance(value, tuple) else (value, np.ones(np.shape(value)))
            total, count = np.asarray(total, np.float64), np.asarray(count, np.float64)
            before_total, before_count = self._totals.get(
                name, (np.zeros_like(total), np.zeros_like(count))
            )
            shapes = {total.shape, count.shape, before_total.shape}
            if len(shapes) > 1 or total.ndim > 1:
                raise ValueError(
                    f"metric `{name}` expects sum and count of one shape, [] or [K], the same in "
                    f"every call; got {total.shape} and {count.shape} after {before_total.shape}"
                )
            self._totals[name] = (before_total + total, before_count + count)

    def means(self) -> dict[str, float | list[float | None]]:
        """Divides every sum by its count.

        Returns:
          Name to mean. A scalar whose count is 0 is left out, since it was not observed and is not
          zero. An array becomes a list with None where the count is 0.
        """
        means: dict[str, float | list[float | None]] = {}
        for name, (total, count) in self._totals.items():
            if total.ndim == 1:
                pairs = zip(total.tolist(), count.tolist(), strict=True)
                means[name] = [part / n if n else None for part, n in pairs]
            elif count:
                means[name] = float(total / count)
        return means


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


def progress_line(
    *,
    step: int,
    total_steps: int,
    loss: float,
    success: float | None,
    verdicts: Mapping[str, float] | None,
    tokens_per_s: float,
    seconds_per_step: float,
) -> str:
    """One line about an update, for a person.

    Args:
      step: updates done.
      total_steps: updates of the whole run.
      loss: nats a student token.
      success: share of the batch's episodes that succeeded, in [0, 1]; None where none was run.
      verdicts: name to share of turns, in [0, 1]; None or empty where nothing was judged.
      tokens_per_s: throughput shown.
      seconds_per_step: wall time of an update, from which the time left is estimated.

    Returns:
      Such as ``"12/200  loss 0.4321  success 25%  skip 50% weak 20%  1.2k tok/s  3m08s left"``.
    """
    parts = [f"{step:>{len(str(total_steps))}}/{total_steps}", f"loss {loss:.4f}"]
    if success is not None:
        parts.append(f"success {success:.0%}")
    if verdicts:
        parts.append(" ".join(f"{name} {share:.0%}" for name, share in verdicts.items()))
    parts.append(f"{_thousands(tokens_per_s)} tok/s")
    parts.append(f"{_duration(seconds_per_step * (total_steps - step))} left")
    return "  ".join(parts)


def write_summary(path: str | Path, results: Mapping[str, Any], *, write: bool) -> None:
    """Merges `results` into a JSON file; readers see the old file or the new one, never a part.

    Args:
      path: usually ``summary.json`` in the workdir.
      results: nested mappings, such as ``{"eval": {who: {split: {"success": ..., ...}}}}``.
        Mappings merge key by key; anything else replaces what was there. Non-finite numbers become
        null.
      write: false on all processes but one; then nothing happens.

    Raises:
      ValueError: the file exists and does not hold a JSON object.
    """
    if not write:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = _merge(read_summary(path), _jsonable(results))
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


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % score interval of a success rate.

    With p = successes / n and z = 1.96:

        (p + z²/2n ± z · sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n)

    Unlike p ± z·sqrt(p(1−p)/n) it stays inside [0, 1] and is not empty at p = 0 or p = 1, where
    trained agents often are.

    Args:
      successes: number of successes, in [0, n].
      n: number of trials; with 0 nothing is known and the interval is [0, 1].

    Returns:
      (low, high), in [0, 1].

    Raises:
      ValueError: `successes` is outside [0, n].

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference,
    Journal of the American Statistical Association 22 (1927), 209-212.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"`successes` must be in [0, n] = [0, {n}], got {successes}")
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, _Z_95**2
    centre = p + z2 / (2 * n)
    half = _Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At the ends the bound is exactly 0 or 1; rounding would leave it some 1e-17 away.
    low = 0.0 if successes == 0 else (centre - half) / (1 + z2 / n)
    high = 1.0 if successes == n else (centre + half) / (1 + z2 / n)
    return low, high


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % Student t interval of a mean: m ± t(0.975, n−1) · s / sqrt(n).

    It suits few values, such as one score a seed; s is the sample standard deviation (n − 1).

    Args:
      values: at least one number.

    Returns:
      (low, high); (nan, nan) for a single value, which says nothing about spread.

    Raises:
      ValueError: `values` is empty.

    Source: Student, The probable error of a mean, Biometrika 6 (1908), 1-25.
    """
    if len(values) == 0:
        raise ValueError("`values` must hold at least one number, got none")
    if len(values) == 1:
        return math.nan, math.nan
    from scipy.special import stdtrit  # jax depends on scipy

    numbers = np.asarray(values, np.float64)
    quantile = float(stdtrit(len(numbers) - 1, 0.975))
    half = quantile * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return float(numbers.mean()) - half, float(numbers.mean()) + half


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


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for name, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else value
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


class Stopwatch:
    """Seconds of named parts of an update, with compilation counted apart.

    Compilation happens inside whichever part first meets a shape; what JAX reports of it is taken
    out of that part and summed in `compile_s`.
    """

    _compile_s = 0.0  # of the process so far
    _listening = False

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.compile_s = 0.0
        if not Stopwatch._listening:
            import jax

            jax.monitoring.register_event_duration_secs_listener(Stopwatch._on_event)
            Stopwatch._listening = True

    @staticmethod
    def _on_event(name: str, seconds: float, **_: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            Stopwatch._compile_s += seconds

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Adds the time of the block to `part`; a part may be measured more than once."""
        start, compiled = time.perf_counter(), Stopwatch._compile_s
        yield
        compiled = Stopwatch._compile_s - compiled
        elapsed = time.perf_counter() - start - compiled
        self.compile_s += compiled
        self.seconds[part] = self.seconds.get(part, 0.0) + max(elapsed, 0.0)
