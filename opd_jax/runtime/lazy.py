"""Imports `transformers` when it is first needed: it takes a second, with torch several."""

import logging
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
