"""The same run on remote clients and in one process: the same model, bit for bit, for every strategy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord

import turnout.strategies  # noqa: F401 - registers the strategies
from turnout.server.fleet import CommitCallback, FleetGrid, FleetServer
from turnout.simulation import Bernoulli, LocalGrid
from turnout.wire import find, methods

N, ROUNDS = 8, 5
# Their clients need a task of their own: test_fleet_own_tasks.py and optimizer_experiments.py have them.
OWN_TASKS = ("bo-rep", "bo-rep-local-upper", "field-space-continual")
SETTINGS: dict[str, dict[str, Any]] = {
    "unbiased-fedavg": {"participation": [0.6] * N},
    "fedstale": {"participation": "estimate"},
    "fedamd": {"anchor_probability": 0.4},
}


def make(slug: str) -> Any:
    target = find("strategy", slug).target
    settings = dict(SETTINGS.get(slug, {}))
    if "clients_per_round" in inspect.signature(target).parameters:
        settings["clients_per_round"] = 5
    return target(num_clients=N, seed=3, **settings)


class Scheduled(FleetGrid):
    """A fleet whose clients take part as a participation model says."""

    participation = Bernoulli([0.7] * N, seed=4)

    def get_node_ids(self) -> list[int]:
        mask = self.participation.mask(self.server_round)
        return [client for client in super().get_node_ids() if mask[client]]


@pytest.fixture(scope="module")
def fleet(
    spawn_for_module: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FleetServer]:
    with FleetServer(num_clients=N, run_config={"seed": 0}) as server:
        for clients in ("0-2", "3-7"):
            folder = tmp_path_factory.mktemp("state")
            spawn_for_module("torch_node.py", server.address, clients, f"node-{clients}", folder)
        yield server


@pytest.fixture(scope="module")
def model() -> ArrayRecord:
    from turnout.tasks.digits import Digits

    return Digits(num_clients=N, model="softmax", alpha=0.5, seed=1).initial_arrays()


@pytest.mark.parametrize("slug", [e.slug for e in methods("strategy") if e.slug not in OWN_TASKS])
def test_a_fleet_gives_the_simulated_model(
    slug: str, fleet: FleetServer, model: ArrayRecord, digest: Callable[[Any], str]
) -> None:
    local = make(slug)
    module = {"__name__": "torch_node"}
    exec((Path(__file__).parent / "torch_node.py").read_text(), module)
    participation = Scheduled.participation
    local.start(LocalGrid(module["app"](0.0), N, participation=participation), model, num_rounds=ROUNDS)

    remote = make(slug)
    grid = Scheduled(fleet, min_clients=N, wait=30)
    remote.start(grid, model, num_rounds=ROUNDS, timeout=30, callbacks=[CommitCallback(grid)])
    assert all(report.outcome == "ok" for report in remote.reports)
    assert digest(remote) == digest(local)
