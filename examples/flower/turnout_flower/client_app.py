"""The clients: the experiment's task and local updates, at home on SuperNodes and in Flower's simulation."""

from __future__ import annotations

from pathlib import Path

from turnout.client import at_home
from turnout.experiment.flower_app import ExperimentApp

app = at_home(ExperimentApp(Path(__file__).with_name("experiment.toml")))
