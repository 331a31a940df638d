"""JSON and text files: read with a clear error, replaced as a whole."""

import json
import os
from pathlib import Path
from typing import Any


def read_json(
    path: Path, *, advice: str = "move it away, or choose another --workdir"
) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: the file does not hold one. The message names it and ends with `advice`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`{path}` must hold a JSON object: {error}; {advice}") from None
    if not isinstance(content, dict):
        got = type(content).__name__
        raise ValueError(f"`{path}` must hold a JSON object, got {got}; {advice}")
    return content


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that a kill or a crash leaves the old content or the new one."""
    # Processes that write the same file at the same time must not share a temporary one.
    temporary = path.with_name(f"{os.getpid()}.{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
