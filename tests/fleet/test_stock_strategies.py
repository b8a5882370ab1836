"""Flower's own strategies on a fleet: the same result as in one process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    Krum,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from turnout.server.fleet import FleetGrid, FleetServer
from turnout.simulation import LocalGrid
from turnout.strategies import StockStrategy
from turnout.wire import ConfigError, view
from turnout.wire.flower import request

N = 5


def private(noise: float, norm: float) -> DifferentialPrivacyServerSideFixedClipping:
    """Return FedAvg whose updates the server clips to ``norm`` and adds noise to."""
    return DifferentialPrivacyServerSideFixedClipping(FedAvg(min_available_nodes=N), noise, norm, N)


STRATEGIES: dict[str, Callable[[], Any]] = {
    "FedAvg": lambda: FedAvg(min_available_nodes=N),
    "FedAdam": lambda: FedAdam(min_available_nodes=N),
    "FedMedian": lambda: FedMedian(min_available_nodes=N),
    "Krum": lambda: Krum(num_malicious_nodes=1, min_available_nodes=N),
    "DifferentialPrivacy": lambda: private(noise=0.5, norm=2.0),
}


@pytest.fixture(scope="module")
def fleet(spawn_for_module: Callable[..., Any]) -> Iterator[FleetServer]:
    with FleetServer(num_clients=N) as server:
        spawn_for_module("numpy_app.py", server.address, "0-2", "--name", "a", "--delay", "0.02")
        spawn_for_module("numpy_app.py", server.address, "3-4", "--name", "b", "--delay", "0.02")
        yield server


@pytest.mark.parametrize("size", [400, 300_000])
@pytest.mark.parametrize("name", STRATEGIES)
def test_stock_strategies_give_the_simulated_model(
    name: str, size: int, fleet: FleetServer, numpy_app: ModuleType, initial: Callable[..., ArrayRecord]
) -> None:
    results = []
    for grid in (FleetGrid(fleet, min_clients=N, wait=30), LocalGrid(numpy_app.make_app(), N)):
        random.seed(1)  # Flower samples, and so sums, in an order of its own.
        np.random.seed(1)  # Of its noise for differential privacy.
        result = STRATEGIES[name]().start(grid, initial(size), num_rounds=3, timeout=30)
        results.append(result)
    for key, array in results[0].arrays.items():
        assert np.any(view(array))
        np.testing.assert_array_equal(view(array), view(results[1].arrays[key]))
    assert results[0].evaluate_metrics_clientapp.keys() == {1, 2, 3}


@pytest.mark.parametrize("name", ["FedAdam", "DifferentialPrivacy"])
def test_wrapped_stock_strategies_give_the_simulated_model(
    name: str, fleet: FleetServer, numpy_app: ModuleType, initial: Callable[..., ArrayRecord]
) -> None:
    """As ``flwr:NAME`` in an experiment runs them: with the round loop of our own strategies."""
    models = []
    for grid in (FleetGrid(fleet, min_clients=N, wait=30), LocalGrid(numpy_app.make_app(), N)):
        strategy = StockStrategy(stock=STRATEGIES[name](), seed=4)
        strategy.start(grid, initial(300_000), num_rounds=3, timeout=30)
        assert {report.outcome for report in strategy.reports} == {"ok"}
        models.append(strategy.x)
    assert np.any(models[0])
    np.testing.assert_array_equal(*models)


def test_updates_are_clipped_before_they_are_averaged(
    fleet: FleetServer, initial: Callable[..., ArrayRecord]
) -> None:
    rounds, norm = 3, 0.25
    grid = FleetGrid(fleet, min_clients=N, wait=30)
    result = private(noise=0.0, norm=norm).start(grid, initial(400), num_rounds=rounds, timeout=30)
    model = np.concatenate([view(array) for array in result.arrays.values()])
    # Unclipped, the first update alone is longer: each client's is 2 and more.
    assert 0.1 * norm < np.linalg.norm(model) <= rounds * norm * (1 + 1e-6)


def test_pushed_requests_are_pulled_once(fleet: FleetServer, initial: Callable[..., ArrayRecord]) -> None:
    from flwr.app import RecordDict

    grid = FleetGrid(fleet, min_clients=N, wait=30)
    content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1})})
    ids = list(grid.push_messages([grid.create_message(content, "train", node, "1") for node in range(N)]))
    got: list[int] = []
    while len(got) < N:
        got += [reply.metadata.src_node_id for reply in grid.pull_messages(ids)]
    assert sorted(got) == list(range(N))
    assert list(grid.pull_messages(ids)) == []


def test_impossible_calls_are_refused(fleet: FleetServer, initial: Callable[..., ArrayRecord]) -> None:
    from flwr.app import RecordDict

    grid = FleetGrid(fleet, min_clients=N, wait=30)
    stranger = request(RecordDict({"arrays": initial()}), dst_node_id=99)
    with pytest.raises(ConfigError, match="99"):
        grid.send_and_receive([stranger])
    with pytest.raises(ConfigError, match="timeout"):
        grid.send_and_receive([], timeout=0)
    with pytest.raises(ConfigError, match="min_clients=50"):
        FleetGrid(fleet, min_clients=50, wait=0.05).start_round(1)
    assert fleet.roster.members[0].name == "a/0"


def test_health_and_reflection(fleet: FleetServer) -> None:
    with grpc.insecure_channel(fleet.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "turnout.v1.Fleet"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(stub.ServerReflectionInfo(iter([asked]), timeout=5))
        assert "turnout.v1.Fleet" in [service.name for service in answer.list_services_response.service]
        asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol="turnout.v1.Fleet")
        assert next(stub.ServerReflectionInfo(iter([asked]), timeout=5)).file_descriptor_response
