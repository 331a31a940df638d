"""Compilation: programs are kept between runs, and named before they are compiled."""

import logging
import re
from typing import Any

import jax

from opd_jax.runtime import bucket, processes, progress

# What the large programs do, by the names of their functions. Small ones compile at once.
PROGRAMS = {
    "sampling_params": "the copy to sample with",
    "extend": "reading",
    "extend_and_tell": "reading what is judged and scored",
    "generate": "sampling",
    "label_scores": "judging",
    "teacher_pass": "the teacher's pass",
    "train_step": "the update",
}
# Where JAX says that it compiles, before it does, and the event after it.
_LOGGER = "jax._src.interpreters.pxla"
_COMPILED = "/jax/core/compile/backend_compile_duration"
# What is loaded from the cache is there sooner, and needs no second line.
_LONG_S = 5.0
# Then XLA asks "Very slow compile?" in five lines, as an error. No flag of its own silences them.
_ALARM_S = 120.0
_compiling: progress.Doing | None = None


def start(program_cache: str) -> None:
    """Keeps compiled programs in a folder, and announces those that take long.

    Args:
      program_cache: the folder, in a bucket too; "" keeps none. What `JAX_COMPILATION_CACHE_DIR`
        names comes first. A bucket that cannot be reached now is warned of: all is compiled anew.

    Raises:
      ValueError: it is a URL of another kind, or the bucket cannot be had.
    """
    if program_cache and not jax.config.values["jax_compilation_cache_dir"]:
        try:
            folder = bucket.place(program_cache, name="program_cache", is_new=True)
            jax.config.update("jax_compilation_cache_dir", bucket.url_of(folder) or str(folder))
        except bucket.Away as error:
            processes.warn("%s; this run keeps no compiled programs", error)
    logger = logging.getLogger(_LOGGER)
    if _announce not in logger.filters:
        logger.setLevel(logging.DEBUG)
        logger.addFilter(_announce)
        jax.monitoring.register_event_duration_secs_listener(_finished)


def _announce(record: logging.LogRecord) -> bool:
    """Says which program is compiled next. One that was kept is loaded in its place.

    Only warnings go on to other handlers: orbax's import gives the root one that prints all.
    """
    found = re.match(r"Compiling (?:jit\()?(\w+)", record.getMessage())
    if found and (what := PROGRAMS.get(found[1])):
        global _compiling
        if _compiling:  # it failed
            progress.end(_compiling)
        processes.say(f"compiling {what} ({found[1]})")
        _compiling = progress.begin(f"compiling {what}")
    return record.levelno >= logging.WARNING


def _finished(event: str, duration_secs: float, **_: Any) -> None:
    """Says how long the program that was announced took."""
    global _compiling
    if event == _COMPILED and _compiling:
        progress.end(_compiling)
        if duration_secs >= _LONG_S:
            hint = ' ("Very slow compile?" is no error)' if duration_secs >= _ALARM_S else ""
            processes.say(f"{_compiling.name} took {duration_secs:.0f} s{hint}")
        _compiling = None
