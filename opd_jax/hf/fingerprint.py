"""Tells whether two folders hold the same model, whatever they are called and wherever they lie."""

import hashlib
from pathlib import Path

from opd_jax.hf.folder import check_folder

# Reading all of a large model takes minutes. Weights that were trained differ nearly everywhere.
_SAMPLES, _SAMPLE_BYTES = 16, 4096

_SMALL = (
    *("config.json", "generation_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json"),
)


def fingerprint(folder: Path) -> str:
    """A hash of the small files of a model, the headers of its weights, and samples of them.

    ValueError if there is no such folder.
    """
    check_folder(folder)
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        end = path.stat().st_size
        with path.open("rb") as file:
            length = file.read(8)
            # What is no safetensors file, such as a pointer to one, has no true length.
            found.update(length + file.read(min(int.from_bytes(length, "little"), end)))
            start = file.tell()
            for n in range(_SAMPLES):
                file.seek(start + (end - start) * n // _SAMPLES)
                found.update(file.read(_SAMPLE_BYTES))
    for name in _SMALL:
        if (folder / name).is_file():
            found.update((folder / name).read_bytes())
    return found.hexdigest()[:16]
