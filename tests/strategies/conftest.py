"""Makes the support modules importable (grid, table, references) and sets up the property tests."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent / "support"))
# A busy machine is no reason to fail, and every run tries the same.
settings.register_profile("turnout", deadline=None, derandomize=True)
settings.load_profile("turnout")
