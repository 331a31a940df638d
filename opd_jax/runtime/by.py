"""How a config chooses an implementation: the field `by` is a known name or `module:name`.

The other fields of its section are keyword arguments of that implementation. They are checked
against its signature before it is called.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def find(
    by: str, known: Mapping[str, str], *, section: str, field: str = "by"
) -> Callable[..., Any]:
    """Imports the function or class that `by` names: a key of `known`, or `module:name`.

    `known` maps a name to `module:name`. Errors name the `section` of the config, and its `field`.

    Raises:
      ValueError: an unknown name, or a module or an attribute that does not exist.
    """
    target = known.get(by, by)
    module, colon, name = target.partition(":")
    if not colon:
        one_of = f"one of {', '.join(known)}, or " if known else ""
        raise ValueError(f"`{section}.{field}`: expected {one_of}module:name; got {by!r}")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if by in known or error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists, but one that it imports does not
        raise ValueError(
            f"`{section}.{field}` = {by!r}: there is no module `{module}`; install it, or put it "
            "beside the config"
        ) from None
    if not hasattr(found, name):
        raise ValueError(f"`{section}.{field}` = {by!r}: module `{module}` has no `{name}`")
    return getattr(found, name)


def check_arguments(
    by: str,
    target: Callable[..., Any],
    given: Mapping[str, Any],
    *,
    section: str,
    field: str = "by",
) -> None:
    """Checks that `target`, found by `by`, takes the keyword arguments `given`.

    Raises:
      ValueError: arguments are missing or unknown. The message names them.
    """
    parameters = dict(inspect.signature(target).parameters)
    rest = [name for name, p in parameters.items() if p.kind is p.VAR_KEYWORD]
    for name in rest:
        del parameters[name]
    needed = [name for name, p in parameters.items() if p.default is p.empty]
    wrong = [
        f"`{section}.{name}` is none of its fields"
        for name in given
        if name not in parameters and not rest
    ]
    wrong += [f"`{section}.{name}` is missing" for name in needed if name not in given]
    if wrong:
        raise ValueError(
            f"`{section}.{field}` = {by!r} does not fit the rest of its section: "
            f"{', '.join(wrong)}; it takes {', '.join([*parameters, *(f'**{n}' for n in rest)])}"
        )
