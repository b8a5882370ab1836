"""Methods whose clients need a task of their own: the same model on every executor and in a real fleet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fleet_commands import Turnout, free_port, simulated

from turnout.experiment.edit import EditOptions, edit_run
from turnout.experiment.recorded import find_run
from turnout.server import RunStore

SHARED = """
[run]
name = "small"
rounds = 4

[participation]
model = "bernoulli"
probabilities = 0.7
"""
EXPERIMENTS = {
    "bo-rep-local-upper": """
[task]
name = "hyper-cleaning"
num_clients = 4
train_examples = 60
validation_examples = 20

[strategy]
name = "bo-rep-local-upper"
interval = 2
client_weights = "examples"
""",
    "field-space-continual": """
[task]
name = "permuted"
num_clients = 4
width = 12
num_tasks = 2
rounds_per_task = 2

[client]
lr = 0.01
local_steps = 3

[strategy]
name = "field-space-continual"
total_rounds = 4
merge = "magnetisation"
prior = "task"
rounds_per_task = 2
kl_weight = 0.1
""",
    "a-sequence-for-fedavg": """
[task]
name = "permuted"
num_clients = 4
model = "float"
width = 12
num_tasks = 2
rounds_per_task = 2

[client]
optimizer = "adamw"
lr = 0.001
local_steps = 3

[strategy]
name = "fedavg"
""",
}


@pytest.fixture(params=EXPERIMENTS)
def written(request: pytest.FixtureRequest, place: Path) -> Path:
    (place / "small.toml").write_text(SHARED + EXPERIMENTS[request.param])
    return place


def test_a_fleet_and_every_executor_give_the_serial_model(
    turnout: Turnout, written: Path, request: pytest.FixtureRequest
) -> None:
    expected = simulated(written, "simulation.executor=serial")
    assert expected.metrics["accuracy"] > 0
    threads = simulated(written, "simulation.executor=threads", "simulation.workers=2")
    assert (threads.model_sha256, threads.metrics) == (expected.model_sha256, expected.metrics)
    # Forks, which this process must not: gRPC may have threads in it.
    chosen = ("--set", "simulation.executor=processes", "--set", "simulation.workers=2")
    forked = turnout("simulate", "small.toml", "--json", "--no-plots", *chosen).end()
    assert (forked["model_sha256"], forked["metrics"]) == (expected.model_sha256, expected.metrics)
    if request.node.callspec.params["written"] == "a-sequence-for-fedavg":
        return  # Nothing travels that the others do not have.
    address = f"127.0.0.1:{free_port()}"
    server = turnout("server", "small.toml", "--address", address, "--json", "--no-plots")
    node = turnout("client", "--server", address, "--clients", "0-3", "--workers", "2", "--json")
    assert server.end()["model_sha256"] == expected.model_sha256
    node.end()


def test_an_edit_asks_real_clients_and_gives_the_simulated_one(turnout: Turnout, place: Path) -> None:
    (place / "small.toml").write_text(
        SHARED.replace("rounds = 4", "rounds = 1")
        + '[task]\nname = "planted-labels"\nnum_clients = 4\ntrain_examples = 80\nwidth = 16\n'
    )
    directory = simulated(place).directory
    with RunStore(place / "simulated", create=False) as store:
        row = find_run(store, "last")
    report = edit_run(row, directory, EditOptions(rho=(0.9, 0.5)))
    expected = json.loads(json.dumps(report.document()))
    assert [edit["rho"] for edit in expected["edits"]] == [0.9, 0.5]
    address = f"127.0.0.1:{free_port()}"
    where = ("--store", "simulated", "--address", address)
    edit = turnout("edit", "last", "--rho", "0.9,0.5", *where, "--json")
    nodes = [turnout("client", "--server", address, "--clients", ids, "--json") for ids in ("0-1", "2-3")]
    assert edit.end() == expected
    for node in nodes:
        node.end()
    assert json.loads((directory / "model" / "edit.json").read_text()) == expected
