"""The command line: ``turnout simulate``, ``server``, ``client``, ``certs``, ``runs`` and more."""

from __future__ import annotations

from turnout.cli.app import app, main

__all__ = ["app", "main"]
