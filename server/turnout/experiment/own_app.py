"""Loads a Flower ClientApp that somebody else wrote."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from flwr.clientapp import ClientApp

from turnout.wire import ConfigError


def load_app(path: str, said: str = "--app") -> ClientApp:
    """Return the ClientApp that ``module:attribute`` names; modules are looked for from here as well.

    ``said`` is where it was named, for errors. Raises `ConfigError`.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{said} {path!r}: write MODULE:ATTRIBUTE, for example my_app:app.")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(f"{said} {path}: {module_name} needs {error.name!r}; install it.") from error
        raise ConfigError(f"{said} {path}: no module {error.name!r} in {here} or installed.") from error
    except Exception as error:
        raise ConfigError(f"{said} {path}: {module_name} raised {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{said} {path}: {module_name} has no {attribute!r}.")
        found = getattr(found, part)
    if not isinstance(found, ClientApp):
        raise ConfigError(f"{said} {path} is a {type(found).__name__}; it must be a Flower ClientApp.")
    return found
