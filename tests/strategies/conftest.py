"""Makes the support modules of these tests importable: the grid, the table of strategies, the references."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))
