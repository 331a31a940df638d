"""One line about an update, for the person who watches."""

from collections.abc import Mapping

from tqdm import tqdm


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
    """Formats how far the run is, how it does, and how long it still takes.

    Args:
      step: updates done.
      total_steps: updates of the whole run.
      loss: nats a student token.
      success: share of the batch's episodes that succeeded, in [0, 1]; None where none was run.
      verdicts: name to share of turns, in [0, 1]; None or empty where nothing was judged.
      tokens_per_s: throughput; None where none was measured.
      seconds_per_step: wall time of an update. The time left is this times the updates left.

    Returns:
      Such as ``"12/200  loss 0.4321  success 25%  skip 50% weak 20%  1.23k tok/s  03:08 left"``.
    """
    parts = [f"{step:>{len(str(total_steps))}}/{total_steps}", f"loss {loss:.4f}"]
    if success is not None:
        parts.append(f"success {success:.0%}")
    if verdicts:
        parts.append(" ".join(f"{name} {share:.0%}" for name, share in verdicts.items()))
    if tokens_per_s is not None:
        parts.append(f"{tqdm.format_sizeof(tokens_per_s)} tok/s")
    left = round(seconds_per_step * (total_steps - step))
    return "  ".join([*parts, f"{tqdm.format_interval(left)} left"])
