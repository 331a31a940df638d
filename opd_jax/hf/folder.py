"""What lies in a model folder beside its weights."""

import fnmatch
import re
import shutil
from pathlib import Path

from opd_jax.runtime.exits import reading

# Weights, in every format, and their indices.
_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.npz"),
    *("*.onnx", "*.onnx_data", "*.ot", "*.tflite", "*.index.json"),
)
# What is read of a model: config, tokenizer, chat template and weights.
_READ = (".json", ".jinja", ".model", ".safetensors")


def check_folder(folder: Path) -> None:
    """Checks that a model folder exists and holds a whole model.

    Raises:
      ValueError: it does not exist, with how a model is downloaded; it is a file, or the Hub's
        cache; a file of the model is a link to nothing, or a pointer of Git LFS; or it holds
        adapters, which `transformers` would add.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"model folder `{folder}` holds adapters (adapter_config.json); merge them into the "
            "model with `merge_and_unload` of peft, and give the folder of the sum"
        )
    if folder.is_dir():
        if cached := sorted(folder.glob("snapshots/*/config.json")):
            raise ValueError(
                f"model folder `{folder}` is the Hub's cache of a model; give the folder of one of "
                f"its snapshots, such as {cached[0].parent}"
            )
        _check_files(folder)
        return
    if folder.exists():
        raise ValueError(
            f"model folder `{folder}` is a file; give the folder that holds config.json, "
            "safetensors files and the tokenizer"
        )
    # OWNER/NAME, as models of the Hub are called, and not a path into a folder that is there.
    named = re.fullmatch(r"(?!models/)[\w-][\w.-]*/[\w-][\w.-]*", str(folder))
    on_hub = bool(named) and not folder.parent.is_dir()
    name = str(folder) if on_hub else "OWNER/NAME"
    target = f"models/{folder.name}" if on_hub else "DIR"
    raise ValueError(
        f"model folder `{folder}` does not exist; check the path, or download the model with "
        f"`hf download {name} --local-dir {target}` and give {target}"
    )


def _check_files(folder: Path) -> None:
    """Checks that each file of the model is there, and not a link or a pointer to it alone."""
    for path in sorted(p for p in folder.iterdir() if p.suffix in _READ):
        if path.is_symlink() and not path.exists():
            raise ValueError(
                f"model folder `{folder}`: {path.name} is a link to `{path.readlink()}`, which is "
                "not there; copy the files that the links name, or fetch the model again"
            )
        if path.is_file() and path.stat().st_size < 1024:
            with reading(path):
                start = path.read_bytes()
            if start.startswith(b"version https://git-lfs"):
                raise ValueError(
                    f"model folder `{folder}`: {path.name} is a pointer of Git LFS, not the file; "
                    "run `git lfs pull` there, or fetch the model again"
                )


def copy_beside_weights(source: Path, folder: Path) -> None:
    """Copies all files of a model folder except weights, config.json and hidden ones.

    Of subfolders only that of further chat templates belongs to what `transformers` opens.
    """
    for path in sorted([*source.iterdir(), *source.glob("additional_chat_templates/*")]):
        hidden = path.name.startswith(".") or path.name == "config.json"
        if path.is_file() and not hidden and not _is_weights(path.name):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def is_needed(name: str) -> bool:
    """Whether a model is opened or exported with a file of its folder, by the path there."""
    folder, _, _ = name.rpartition("/")
    is_readable = ".safetensors" in name or not _is_weights(name)
    return is_readable and folder in ("", "additional_chat_templates")


def _is_weights(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in _WEIGHTS)
