"""A safetensors file written one tensor at a time, in any order.

`safetensors.numpy.save_file` wants all tensors of a file at once. Here the header comes first, made
from shapes alone, and each tensor is put in its place as soon as it is there; the bytes are the
same.

Format: the header's length in eight bytes, little-endian; the header in JSON, filled up with spaces
to a multiple of eight bytes; then the tensors.
Source: https://github.com/huggingface/safetensors.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_tensors(
    path: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
) -> None:
    """Writes a file of tensors of one type.

    Args:
      tensors: each of `shapes` once, contiguous, by name; no more than one is held.
      shapes: of the tensors, by name.
      dtype: of all; float32, float16 or bfloat16.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + math.prod(shapes[name]) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPES[dtype.name],
            "shape": shapes[name],
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(tensor.reshape(-1).view(np.uint8).data)
