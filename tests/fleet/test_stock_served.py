"""Flower's strategies and mods on the gRPC fleet, by name in the experiment: the simulated model."""

from __future__ import annotations

from pathlib import Path

import tomli_w
from fleet_commands import Turnout, free_port

from turnout.experiment import Experiment
from turnout.simulation.run import simulate


def test_clipping_clients_and_a_noisy_server(turnout: Turnout, tmp_path: Path) -> None:
    experiment = Experiment.from_dict(
        {
            "run": {"rounds": 2, "directory": str(tmp_path / "runs")},
            "task": {"name": "digits", "model": "softmax", "num_clients": 4},
            "client": {"local_steps": 2},
            "participation": {"model": "bernoulli", "probabilities": 0.8},
            "strategy": {
                "name": "flwr:DifferentialPrivacyClientSideFixedClipping",
                "noise_multiplier": 0.1,
                "clipping_norm": 0.05,
                "num_sampled_clients": 3,
                "strategy": {"name": "FedAdam", "eta": 0.05},
            },
            "link": {"name": "flwr:fixedclipping_mod"},
        }
    )
    file = tmp_path / "private.toml"
    file.write_text(tomli_w.dumps(experiment.resolved()))
    address = f"127.0.0.1:{free_port()}"
    server = turnout("server", file, "--address", address, "--json", "--no-plots")
    node = turnout("client", "--server", address, "--clients", "0-3", "--json")
    expected = simulate(experiment, plots=False)
    document = server.end()
    assert node.end()["reason"] == "the run is over"
    assert (document["rounds"], document["model_sha256"]) == (2, expected.model_sha256)
    assert document["metrics"] == expected.metrics
