"""Simulation in one process: participation models and `LocalGrid`, a Flower ``Grid`` without Ray."""

from __future__ import annotations

from turnout.simulation.bernoulli import Bernoulli
from turnout.simulation.cyclic import Cyclic
from turnout.simulation.executors import EXECUTORS, Executor
from turnout.simulation.grid import LocalGrid, Tally
from turnout.simulation.markov import Markov
from turnout.simulation.participation import Always, Mask, ParticipationModel
from turnout.simulation.probabilities import Probabilities, constant, given, label_correlated, two_group
from turnout.simulation.sampled import Sampled
from turnout.simulation.trace import Trace

__all__ = [
    "EXECUTORS",
    "Always",
    "Bernoulli",
    "Cyclic",
    "Executor",
    "LocalGrid",
    "Markov",
    "Mask",
    "ParticipationModel",
    "Probabilities",
    "Sampled",
    "Tally",
    "Trace",
    "constant",
    "given",
    "label_correlated",
    "two_group",
]
