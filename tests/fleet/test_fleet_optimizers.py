"""Clients' optimizers in a fleet of real processes: as simulated, and their state across restarts."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet_commands import Turnout, free_port, simulated
from flwr.app import ConfigRecord
from optimizer_experiments import CLIENTS, CODED, METHODS, experiment

from turnout.experiment import Experiment
from turnout.experiment.build import Federation, build
from turnout.server.fleet import CommitCallback, FleetGrid, FleetServer
from turnout.simulation import ParticipationModel
from turnout.strategies import Callback, RoundReport
from turnout.wire import load_checkpoint, save_checkpoint

N, ROUNDS = 6, 4


class Scheduled(FleetGrid):
    """A fleet whose clients take part as in the experiments."""

    participation: ParticipationModel

    def get_node_ids(self) -> list[int]:
        mask = self.participation.mask(self.server_round)
        return [client for client in super().get_node_ids() if mask[client]]


class KeepCheckpoint(Callback):
    """Saves the state of one round, and has something done then."""

    def __init__(self, path: Path, server_round: int, then: Callable[[], None] = lambda: None) -> None:
        self.path, self.server_round, self.then = path, server_round, then

    def on_round_end(self, report: RoundReport) -> None:
        if report.server_round == self.server_round:
            save_checkpoint(self.path, report.checkpoint())
            self.then()


@pytest.fixture(scope="module")
def served(
    spawn_for_module: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[FleetServer, Callable[[], Any]]]:
    """Return a server with a node process of three clients, and how to start the node of the others."""
    with FleetServer(num_clients=N) as server:
        spawn_for_module(
            "optimizer_node.py", server.address, "0-2", "first", tmp_path_factory.mktemp("first")
        )
        folder = tmp_path_factory.mktemp("second")
        yield server, lambda: spawn_for_module("optimizer_node.py", server.address, "3-5", "second", folder)


@pytest.fixture(scope="module")
def node(served: tuple[FleetServer, Callable[[], Any]]) -> list[Any]:
    """Return the node process of clients 3 to 5, the newest last."""
    return [served[1]()]


def fleet_grid(server: FleetServer, parts: Federation) -> Scheduled:
    grid = Scheduled(server, min_clients=N, wait=60)
    grid.participation = parts.participation
    return grid


def federation(text: str) -> Federation:
    # Not in forked processes: gRPC has threads in this one.
    return build(Experiment.from_dict({**tomllib.loads(text), "simulation": {"executor": "serial"}}))


def run(grid: Any, parts: Federation, text: str, *callbacks: Callback, **options: Any) -> Any:
    config = ConfigRecord({"experiment": text})
    parts.strategy.start(
        grid,
        parts.task.initial_arrays(),
        num_rounds=ROUNDS,
        train_config=config,
        callbacks=list(callbacks),
        **options,
    )
    assert all(report.outcome == "ok" for report in parts.strategy.reports)
    return parts.strategy


@pytest.mark.parametrize("slug", [*CLIENTS, *METHODS, *CODED])
def test_a_fleet_trains_as_the_simulation(
    slug: str, served: Any, node: list[Any], digest: Callable[[Any], str]
) -> None:
    text = METHODS.get(slug) or experiment({**CLIENTS, **CODED}[slug], ROUNDS)
    local, remote = federation(text), federation(text)
    expected = run(local.grid, local, text)
    grid = fleet_grid(served[0], remote)
    strategy = run(grid, remote, text, CommitCallback(grid), timeout=60)
    assert digest(strategy) == digest(expected)
    assert expected.x.any()


@pytest.mark.parametrize("slug", ["classp", "frugal"])
def test_state_survives_a_killed_node_and_a_resumed_server(
    slug: str, served: Any, node: list[Any], tmp_path: Path, digest: Callable[[Any], str]
) -> None:
    """ "keep" lies on the client's disk, "send" in the server's checkpoint."""
    text = experiment(CLIENTS[slug], ROUNDS)
    whole, first, second = (federation(text) for _ in range(3))
    expected = run(whole.grid, whole, text)
    path = tmp_path / "round-2.safetensors"

    def restart() -> None:
        node[-1].kill()
        node.append(served[1]())

    grid = fleet_grid(served[0], first)
    kept = KeepCheckpoint(path, 2, restart)
    again = run(grid, first, text, CommitCallback(grid), kept, timeout=60)
    assert digest(again) == digest(expected)

    checkpoint = load_checkpoint(path)
    sent = bool(checkpoint["strategy"].get("carried", {}).get("means"))
    assert sent == ('"send"' in text)
    if sent:  # The clients' own state is of the run that went on; what was sent is in the checkpoint.
        grid = fleet_grid(served[0], second)
        resumed = run(grid, second, text, CommitCallback(grid), resume_from=path, timeout=60)
        assert digest(resumed) == digest(expected)


def test_a_served_run_of_the_command_line_hands_on_state_as_a_simulated_one(
    turnout: Turnout, place: Path
) -> None:
    overrides = ('client.optimizer="frugal"', 'client.optimizer_state="send"', "client.lr=0.01")
    chosen = [word for override in overrides for word in ("--set", override)]
    address = f"127.0.0.1:{free_port()}"
    server = turnout("server", "small.toml", *chosen, "--address", address, "--json", "--no-plots")
    node = turnout("client", "--server", address, "--clients", "0-5", "--json")
    expected = simulated(place, *overrides)
    assert server.end()["model_sha256"] == expected.model_sha256
    node.end()
    without = simulated(place, overrides[0], overrides[2])
    assert without.model_sha256 != expected.model_sha256
