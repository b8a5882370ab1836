"""The tree of errors that Turnout raises. Every message names the field, the value and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TurnoutError(Exception):
    """Base of every error raised on purpose by Turnout."""


class ConfigError(TurnoutError, ValueError):
    """A value given by the user cannot be used."""


class DataError(TurnoutError):
    """A data set or pretrained model is missing or not the one expected."""


class LayoutError(TurnoutError, ValueError):
    """Arrays do not have the names, shapes or dtypes of the model's layout."""


class CheckpointError(TurnoutError):
    """A checkpoint file is missing, damaged, or of another run."""


class ReplyRejected(TurnoutError):  # noqa: N818 - an outcome, counted by its reason
    """A client's reply was refused before it could touch the model.

    ``reason`` is a short kebab-case word that reports and metrics count by, such as ``"non-finite"``.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for an unknown name, with the nearest known ones."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}.")
