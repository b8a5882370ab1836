"""One experiment on four engines: `LocalGrid`, the gRPC fleet, SuperLink with SuperNodes, Flower on Ray."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from fleet_commands import Turnout, free_port

from flower_superlink import SuperLink, federation
from turnout.experiment import load_experiment
from turnout.experiment.flower_app import experiment_of
from turnout.server import RunStore
from turnout.simulation.run import simulate

pytestmark = [pytest.mark.flower, pytest.mark.timeout(900)]

APP = Path(__file__).resolve().parents[2] / "examples/flower"
EXPERIMENT = APP / "turnout_flower/experiment.toml"
CLIENTS, ROUNDS = 4, 3
# A memory on the server; three numbers a client; two kinds of work; state at the clients, which is caught up
# on; one of Flower's own.
STRATEGIES = ("fedstale", "fedau", "fedamd", "rerce-fed", "flwr:FedAdam")
# Adapters: a plain one, with a memory; columns that the server hands out; entries that it picks anew; ranks
# that it decides by what clients report; replies with some of the tensors, averaged as dense updates.
ADAPTERS = {
    "lora": ("fedstale", "peft.r=4"),
    "paca": ("fedamd", "peft.r=4"),
    "lift": ("fedau", "peft.r=2 peft.filter_rank=4 peft.update_interval=2"),
    "adalora": ("fedavg", "peft.init_r=4 peft.target_r=2 peft.tfinal=5 peft.total_step=15"),
    "ist": ("fedavg", 'peft.base={name="lora",r=4,aggregation="exact-svd"}'),
}
CASES = [*((strategy, "") for strategy in STRATEGIES)] + [
    (strategy, f"peft.name={slug} {options}") for slug, (strategy, options) in ADAPTERS.items()
]
COMMON = f"run.rounds={ROUNDS} fleet.wait=120 fleet.timeout=300"


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    with federation(tmp_path_factory.mktemp("superlink"), range(CLIENTS)) as link:
        yield link


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: `make test-flower` installs it")
    with SuperLink(tmp_path_factory.mktemp("ray"), simulation_nodes=CLIENTS) as link:
        yield link


@pytest.fixture(params=CASES, ids=[*STRATEGIES, *ADAPTERS])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One strategy's or adapter's experiment, as a file of its own."""
    path = tmp_path / "one.toml"
    strategy, adapter = request.param
    settings = f"{COMMON} run.directory={tmp_path / 'runs'} {adapter}"
    experiment = experiment_of({"strategy": strategy, "set": settings}, EXPERIMENT)
    path.write_text(tomli_w.dumps(experiment.resolved()))
    return path


def recorded(file: Path) -> tuple[dict[str, Any], dict[int, int]]:
    """Return the newest run of the store: its summary, and the participations of each client."""
    with RunStore(file.parent / "runs") as store:
        run = store.run("last")
        assert (run.status, run.num_clients) == ("finished", CLIENTS)
        rounds = store.rounds(run.id)
        assert [row.round for row in rounds] == list(range(1, ROUNDS + 1))
        assert sum(row.failed + row.rejected + row.missing for row in rounds) == 0
        counts: dict[int, int] = {}
        for row in store.client_rows(run.id):
            counts[row.client] = counts.get(row.client, 0) + (row.outcome == "ok")
        metrics = store.latest_metrics(run.id)
        return {"model_sha256": run.model_sha256, "metrics": metrics}, counts


def on_flower(link: SuperLink, file: Path, app: Path = APP) -> dict[str, Any]:
    said = link.run(app, {"experiment": str(file), "runs": str(file.parent / "runs")})
    lines = [line[line.index("{") :] for line in said.splitlines() if '"model_sha256"' in line]
    assert lines, said + link.logs()
    document: dict[str, Any] = json.loads(lines[-1])
    return document


def test_every_engine_ends_with_the_same_model(
    file: Path, turnout: Turnout, superlink: SuperLink, ray: SuperLink
) -> None:
    local = simulate(load_experiment(file), plots=False)
    expected = recorded(file)
    assert expected[0]["model_sha256"] == local.model_sha256
    assert 0 < sum(expected[1].values()) < CLIENTS * ROUNDS  # Clients come and go.

    address = f"127.0.0.1:{free_port()}"
    server = turnout("server", file, "--address", address, "--json", "--no-plots")
    node = turnout("client", "--server", address, "--clients", f"0-{CLIENTS - 1}", "--json")
    fleet = server.end()
    assert node.end()["reason"] == "the run is over"
    assert (fleet["model_sha256"], recorded(file)) == (local.model_sha256, expected)

    for link in (superlink, ray):
        document = on_flower(link, file)
        assert (document["rounds"], document["model_sha256"]) == (ROUNDS, local.model_sha256)
        assert recorded(file) == expected
