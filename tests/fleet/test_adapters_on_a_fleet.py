"""Adapters on a small transformer: a fleet ends with the bits of a simulation."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
from flwr.app import ArrayRecord

from turnout.client.node import run_node
from turnout.experiment.build import build, make_app
from turnout.server.fleet import CommitCallback, FleetGrid, FleetServer

sys.path[:0] = [str(Path(__file__).parents[1] / "adapters")]

from adapter_federation import (  # noqa: E402 - found by the line above
    ADAPTERS,
    CLIENTS,
    ROUNDS,
    digest,
    experiment,
    needs_plays,
    simulated,
)


def served(slug: str, folder: Path) -> ArrayRecord:
    chosen = experiment(slug)
    made, theirs = build(chosen), build(chosen)  # Client and server each have objects of their own.
    with FleetServer(num_clients=CLIENTS, run_config={"seed": 3}) as server:
        node = threading.Thread(
            target=run_node,
            args=(server.address, make_app(chosen, theirs.task), range(CLIENTS)),
            kwargs={"name": "node", "state_dir": folder, "workers": 2},
        )
        node.start()
        grid = FleetGrid(server, min_clients=CLIENTS, wait=30)
        result = made.strategy.start(
            grid,
            made.task.initial_arrays(),
            num_rounds=ROUNDS,
            timeout=30,
            callbacks=[CommitCallback(grid)],
        )
    node.join(timeout=30)
    assert {report.outcome for report in made.strategy.reports} == {"ok"}
    return result.arrays


@needs_plays
@pytest.mark.data
@pytest.mark.parametrize("slug", ADAPTERS)
def test_a_fleet_ends_with_the_bits_of_a_simulation(slug: str, tmp_path: Path) -> None:
    assert digest(served(slug, tmp_path)) == digest(simulated(slug, "serial"))
