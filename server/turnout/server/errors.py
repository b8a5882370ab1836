"""Errors of the run store and the run directory."""

from __future__ import annotations

from turnout.wire import TurnoutError


class StoreError(TurnoutError):
    """The run store cannot be reached, is of a newer version, or does not hold what was asked for."""


class RunDirectoryError(TurnoutError):
    """A run directory is missing, incomplete, or in use by another process."""
