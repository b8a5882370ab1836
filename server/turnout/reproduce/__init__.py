"""Small studies of the papers behind the strategies: ``turnout reproduce SLUG`` runs them.

Each drives Turnout's own strategy classes over vectors, prints its figures beside those of an independent
implementation, and says of every claim whether it holds. Importing this package registers the studies.
"""

from __future__ import annotations

from turnout.reproduce import auon, classp, eco, eggroll, fedamd, fedau, fedstale, frugal, rerce_fed_admm
from turnout.reproduce.report import Claim, Plot, Progress, StudyReport, Table

__all__ = [
    "Claim",
    "Plot",
    "Progress",
    "StudyReport",
    "Table",
    "auon",
    "classp",
    "eco",
    "eggroll",
    "fedamd",
    "fedau",
    "fedstale",
    "frugal",
    "rerce_fed_admm",
]
