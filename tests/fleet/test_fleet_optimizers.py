"""Clients' optimizer state in a fleet of real processes: as simulated, and across restarts."""

from __future__ import annotations

from pathlib import Path

import pytest
from fleet_commands import Turnout, free_port, simulated


def chosen(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


@pytest.mark.parametrize("policy", ["keep", "send"])
def test_a_served_run_hands_on_state_as_a_simulated_one(policy: str, turnout: Turnout, place: Path) -> None:
    overrides = ('client.optimizer="adamw"', f'client.optimizer_state="{policy}"', "client.lr=0.01")
    address = f"127.0.0.1:{free_port()}"
    server = turnout(
        "server", "small.toml", *chosen(*overrides), "--address", address, "--json", "--no-plots"
    )
    nodes = [
        turnout("client", "--server", address, "--clients", clients, "--json") for clients in ("0-2", "3-5")
    ]
    expected = simulated(place, *overrides)
    assert server.end()["model_sha256"] == expected.model_sha256
    for node in nodes:
        node.end()
    assert simulated(place, *overrides[:1], overrides[2]).model_sha256 != expected.model_sha256
