"""Run as ``python -m turnout.cli``."""

from __future__ import annotations

from turnout.cli.app import main

main()
