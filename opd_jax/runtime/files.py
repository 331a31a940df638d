"""JSON and text files of a workdir: read with a clear error, replaced as a whole."""

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: the file does not hold one; names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(
            f"`{path}` must hold a JSON object and does not; move it away, or choose another "
            "--workdir"
        )
    return content


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that a kill or a crash leaves the old content or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
