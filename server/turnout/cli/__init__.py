"""The command line: ``turnout simulate``, ``methods``, ``reproduce``, ``runs``, ``version``."""

from __future__ import annotations

from turnout.cli.app import app, main

__all__ = ["app", "main"]
