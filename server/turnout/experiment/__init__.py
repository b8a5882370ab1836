"""The experiment file: one TOML that says what is computed, on every engine."""

from __future__ import annotations

from turnout.experiment.model import Experiment, load_experiment

__all__ = ["Experiment", "load_experiment"]
