"""Tests of the documentation: the site's own code is importable, and pages are found in one place."""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

sys.path.insert(0, str(REPOSITORY / "website"))
sys.path.insert(0, str(Path(__file__).parent))

from turnout.experiment.methods import load_methods  # noqa: E402 - after the paths

load_methods()  # Pages are held against what is registered.
