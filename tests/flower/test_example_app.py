"""examples/flower in this process: its server and client code on a grid that behaves as SuperLink's."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from node_grid import NodeGrid

from turnout.experiment.flower_app import experiment_of
from turnout.server import RunStore
from turnout.simulation.run import simulate
from turnout.wire import ConfigError

APP = Path(__file__).resolve().parents[2] / "examples/flower"
EXPERIMENT = APP / "turnout_flower/experiment.toml"
CLIENTS = 4


@pytest.fixture
def defaults() -> dict[str, Any]:
    """The run config of the app's pyproject.toml."""
    project = tomllib.loads((APP / "pyproject.toml").read_text(encoding="utf-8"))
    return dict(project["tool"]["flwr"]["app"]["config"])


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The app's ServerApp and ClientApp, as its pyproject.toml names them."""
    monkeypatch.syspath_prepend(APP)
    project = tomllib.loads((APP / "pyproject.toml").read_text(encoding="utf-8"))
    named = project["tool"]["flwr"]["app"]["components"]
    found = []
    for kind in ("serverapp", "clientapp"):
        module, _, attribute = named[kind].partition(":")
        __import__(module)
        found.append(getattr(sys.modules[module], attribute))
    yield found[0], found[1]
    for name in [name for name in sys.modules if name.startswith("turnout_flower")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the runs, and have their own tests."""
    monkeypatch.setattr("turnout.experiment.on_flower.plot_recorded", lambda *_: None)


def run(parts: tuple[Any, Any], config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    server, client = parts
    grid = NodeGrid(client, range(CLIENTS), seed=7)
    grid.run_config = config
    server(grid, Context(1, 1, {}, RecordDict(), config))
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


@pytest.mark.parametrize("strategy", ["", "fedau", "fedamd", "flwr:FedYogi"])
def test_the_app_gives_the_simulated_model(
    strategy: str,
    parts: tuple[Any, Any],
    defaults: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = {**defaults, "strategy": strategy, "runs": str(tmp_path / "flower"), "set": "run.rounds=3"}
    document = run(parts, config, capsys)
    own = {"strategy": strategy, "set": f"run.rounds=3 run.directory={tmp_path / 'simulated'}"}
    expected = simulate(experiment_of(own, EXPERIMENT), plots=False)
    assert (document["rounds"], document["model_sha256"]) == (3, expected.model_sha256)
    assert document["metrics"] == expected.metrics
    with RunStore(tmp_path / "flower") as store:
        [row] = store.runs()
        assert (row.id, row.status, row.strategy) == (document["run_id"], "finished", strategy or "fedstale")
        assert {client.client for client in store.client_rows(row.id)} <= set(range(CLIENTS))


def test_a_stopped_run_goes_on_from_its_clients_files(
    parts: tuple[Any, Any], defaults: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts[1].state_dir = tmp_path / "state"
    config = {**defaults, "strategy": "rerce-fed", "runs": str(tmp_path / "runs")}
    first = run(parts, {**config, "set": "run.rounds=2"}, capsys)
    second = run(parts, {**config, "set": "run.rounds=4", "resume": "last"}, capsys)
    assert first["run_id"] == second["run_id"]
    own = {"strategy": "rerce-fed", "set": f"run.rounds=4 run.directory={tmp_path / 'simulated'}"}
    assert second["model_sha256"] == simulate(experiment_of(own, EXPERIMENT), plots=False).model_sha256


def test_the_run_config_says_which_experiment(tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text('[task]\nname = "digits"\n[strategy]\nname = "fedavg"\n')
    assert experiment_of({}, EXPERIMENT).strategy.options["beta"] == 0.5
    assert experiment_of({"experiment": str(other)}, EXPERIMENT).strategy.name == "fedavg"
    chosen = experiment_of({"strategy": "fedamd", "set": "client.lr=0.05 run.rounds=7"}, EXPERIMENT)
    assert (chosen.strategy.options["anchor_probability"], chosen.client["lr"], chosen.run.rounds) == (
        0.3,
        0.05,
        7,
    )
    for wrong in ({"strategy": "fedsta"}, {"set": "run.rouns=3"}, {"experiment": "missing.toml"}):
        with pytest.raises(ConfigError):
            experiment_of(wrong, EXPERIMENT)
