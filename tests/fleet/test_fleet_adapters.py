"""Adapters over gRPC, with what the server decides between rounds: the simulated model, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from fleet_commands import Turnout, free_port, simulated


@pytest.mark.parametrize(
    "chosen",
    [
        (
            "peft.name=adalora",
            "peft.init_r=4",
            "peft.target_r=1",
            "peft.total_step=6",
            "peft.tfinal=4",  # So that the last round is narrow both ways.
            "peft.init_std=0.2",
            "task.model=mlp",
        ),
        ("peft.name=ist", "peft.n_update_ratio=0.5", "peft.interval=1", "task.model=mlp"),
        ("peft.name=tera", "peft.train_modes=all", "peft.aggregation=exact-als", "task.model=mlp"),
        ("peft.name=snella", "peft.aggregation=exact-fold", "peft.total_step=6", "task.model=mlp"),
    ],
    ids=lambda chosen: chosen[0],
)
def test_a_served_run_with_adapters_equals_the_simulated_one(
    chosen: tuple[str, ...], turnout: Turnout, place: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    told = [word for setting in chosen for word in ("--set", setting)]
    server = turnout("server", "small.toml", *told, "--address", address, "--json", "--no-plots")
    node = turnout("client", "--server", address, "--clients", "0-5", "--json")
    expected = simulated(place, *chosen)
    document = server.end()
    assert document["model_sha256"] == expected.model_sha256
    assert document["metrics"] == expected.metrics
    assert node.end()["reason"] == "the run is over"
