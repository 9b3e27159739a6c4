"""Classes from outside drafttrain that methods name: imported by their dotted names, and held against a protocol.

Importing a module runs its code, so nothing is imported here unless the person allowed it (--allow-code).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Collection

from drafttrain.errors import UserError


def load_class(path: str) -> type:
    """Import a class; modules are found in the current folder too, first of all, as `python -m` finds them.

    Args:
        path: module and class, e.g. ``my_package.my_module.MyDrafter``.

    Raises:
        UserError: there is no such module, it has no such class, or the class leaves a protocol's method open.
    """
    module_name, _, name = path.rpartition(".")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; what it imports is not
        raise UserError(
            f"there is no module {error.name} for {path}: neither in the current folder, {os.getcwd()}, nor installed"
        ) from None
    found = vars(module).get(name)
    if not isinstance(found, type):
        classes = [each for each, value in vars(module).items() if isinstance(value, type)]
        raise UserError(f"{module_name} has no class {name}; {nearest(name, classes)}")
    if inspect.isabstract(found):
        raise UserError(f"{path} cannot be made: it lacks {', '.join(sorted(found.__abstractmethods__))}")
    return found


def lacking(thing: object, protocol: type) -> list[str]:
    """The attributes and methods of a protocol that an object does not have."""
    methods = [name for name, value in vars(protocol).items() if inspect.isfunction(value) and name[0] != "_"]
    return [name for name in (*protocol.__annotations__, *methods) if not hasattr(thing, name)]


def nearest(name: str, known: Collection[str]) -> str:
    """What a person who wrote `name` may have meant, as the end of a sentence."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known are: {', '.join(sorted(known)) or 'none'}"
