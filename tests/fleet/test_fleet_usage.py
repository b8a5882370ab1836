"""What `turnout server`, `turnout client` and ``[fleet]`` say to what cannot be."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from fleet_commands import (
    own,
)

from turnout.experiment import load_experiment
from turnout.experiment.build import build, make_task
from turnout.experiment.sections import FleetSection
from turnout.experiment.serve import for_clients
from turnout.wire import ConfigError

BAD_CLIENTS = [
    (["--app", "own_app"], "write MODULE:ATTRIBUTE"),
    (["--app", "own_ap:app"], "no module 'own_ap'"),
    (["--app", "own_app:apps"], "has no 'apps'"),
    (["--app", "own_app:text"], "must be a Flower ClientApp"),
    (["--app", "own_app:app", "--clients", "4-2"], "clients='4-2'"),
    (["--app", "own_app:app", "--tag", "north"], "write KEY=VALUE"),
    (["--app", "own_app:app", "--certs", "pki"], "needs --name"),
    (["--app", "own_app:app", "--certs", "pki", "--name", "x"], "has no ca.pem"),
    (["--app", "own_app:app", "own.toml"], "give one of them"),
    (["--app", "own_app:app", "--server", "10.0.0.1:1"], "another machine"),
    (["--app", "own_app:app", "--server", "10.0.0.1"], "write HOST:PORT"),
]


def test_bad_client_commands_say_what_to_write(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from turnout.cli import app

    own(place, 0)
    monkeypatch.chdir(place)
    for arguments, said in BAD_CLIENTS:
        result = CliRunner().invoke(app, ["client", "--server", "127.0.0.1:1", *arguments])
        assert result.exit_code == 2, result.output
        assert said in result.stderr.replace("\n", " "), arguments


def test_bad_server_commands_leave_nothing_behind(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from turnout.cli import app

    monkeypatch.chdir(place)
    for arguments, code, said in [
        (["small.toml", "--address", "9091"], 2, "write HOST:PORT"),
        (["small.toml", "--address", "0.0.0.0:0"], 2, "can be reached from other machines"),
        (["small.toml", "--certs", "none"], 2, "has no ca.pem"),
        (["small.toml", "--address", "192.0.2.1:9", "--insecure"], 3, "cannot be used"),
        ([], 2, "name a file"),
        (["--resume", "last"], 3, "no run store"),
    ]:
        result = CliRunner().invoke(app, ["server", *arguments])
        assert result.exit_code == code, result.output
        assert said in result.stderr.replace("\n", " "), arguments
    assert not list((place).glob("runs/*/"))


def test_what_clients_are_sent_is_what_they_compute(place: Path) -> None:
    experiment = load_experiment(
        place / "small.toml", ["run.store=postgresql://me:secret@db/runs", "link.sigma_up=0.1"]
    )
    text = for_clients(experiment)
    assert "secret" not in text
    assert set(tomllib.loads(text)) == {"run", "task", "client", "link"}
    assert tomllib.loads(text)["run"] == {"seed": 0}


def test_eligibility_goes_by_what_clients_say() -> None:
    fleet = FleetSection(device="cuda", tags={"site": "north"}, min_examples=10)
    good = {"device": "cuda:NVIDIA H100", "tags": {"site": "north", "rack": "4"}, "examples": 10}
    assert fleet.eligible(good)
    for worse in ({"device": "cpu"}, {"tags": {"site": "south"}}, {"examples": 9}):
        assert not fleet.eligible({**good, **worse})
    assert FleetSection().eligible({})


def test_a_task_of_clients_own_cannot_be_simulated(place: Path) -> None:
    own(place, 0)
    settings = f"task.model={place / 'initial.safetensors'}"
    with pytest.raises(ConfigError, match=r"own.toml:5.*cannot be simulated.*turnout client --app"):
        build(load_experiment(place / "own.toml", [settings]))
    (place / "initial.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"model=.*cannot be read.*Name a safetensors file"):
        make_task(load_experiment(place / "own.toml", [settings]))
