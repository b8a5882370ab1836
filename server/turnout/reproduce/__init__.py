"""Small studies of the papers behind the methods: ``turnout reproduce SLUG`` runs them.

Each drives Turnout's own classes, prints its figures beside those of an independent
implementation, and says of every claim whether it holds. Importing this package registers the studies.
"""

from __future__ import annotations

from turnout.reproduce import (
    adalora,
    auon,
    bo_rep,
    bone,
    classp,
    eco,
    eggroll,
    fedamd,
    fedau,
    fedstale,
    field_space_continual,
    frugal,
    hut,
    ist,
    lift,
    loss_curvature_edit,
    paca,
    rerce_fed_admm,
    s2ft,
    snella,
    tera,
    weight_compander,
)
from turnout.reproduce.report import Claim, Plot, Progress, StudyReport, Table

__all__ = [
    "Claim",
    "Plot",
    "Progress",
    "StudyReport",
    "Table",
    "adalora",
    "auon",
    "bo_rep",
    "bone",
    "classp",
    "eco",
    "eggroll",
    "fedamd",
    "fedau",
    "fedstale",
    "field_space_continual",
    "frugal",
    "hut",
    "ist",
    "lift",
    "loss_curvature_edit",
    "paca",
    "rerce_fed_admm",
    "s2ft",
    "snella",
    "tera",
    "weight_compander",
]
