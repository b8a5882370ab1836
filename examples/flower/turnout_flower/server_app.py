"""The server: the experiment's strategy over Flower's grid, recorded in Turnout's run store."""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from turnout.experiment.flower_app import experiment_of
from turnout.experiment.on_flower import run_on_flower

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment and print what came of it as one line of JSON."""
    config = context.run_config
    settings = f"{config['set']} run.directory={config['runs']}"
    experiment = experiment_of({**config, "set": settings}, Path(__file__).with_name("experiment.toml"))
    summary = run_on_flower(experiment, grid, resume=str(config["resume"]) or None)
    print(json.dumps(summary.document()), flush=True)
