"""Imports libraries when they are first needed: they take a second, with torch several."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any


def import_transformers() -> Any:
    """The package `transformers`, without its warning that there is no PyTorch.

    Tokenizers need none, and no model of `transformers` is used.
    """
    logging.getLogger("transformers").addFilter(_is_not_about_torch)
    import transformers

    return transformers


def _is_not_about_torch(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("PyTorch was not found")


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """In the block an import of torch fails as if there was none.

    For libraries that import it where it is there, though nothing that is used of them needs it:
    it takes seconds, and one that is broken raises what they do not expect.
    """
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if absent:
            del sys.modules["torch"]
