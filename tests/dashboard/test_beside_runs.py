"""Dashboards beside runs: whatever happens to them, the run ends with the same model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
import tomli_w
from dashboard_runs import Command, experiment, follow
from typer.testing import CliRunner

from turnout.cli import app
from turnout.dashboard import Dashboard, DashboardOptions, StoreReader
from turnout.experiment import load_experiment
from turnout.server import RunStore, StoreError
from turnout.simulation.run import simulate

SMALL = {"rounds": 25}


def written(place: Path, folder: Path, **run: object) -> Path:
    file = place / "small.toml"
    document = experiment(folder, **(SMALL | run))
    document["client"] = document["client"] | {"local_steps": 20}
    file.write_text(tomli_w.dumps(document))
    return file


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model of a run that nobody looks at."""
    place = tmp_path_factory.mktemp("alone")
    return simulate(load_experiment(written(place, place / "runs")), plots=False).model_sha256


def test_killing_the_dashboard_leaves_the_run_alone(tmp_path: Path, undisturbed: str) -> None:
    written(tmp_path, tmp_path / "runs")
    RunStore(tmp_path / "runs").close()
    dashboard = Command(tmp_path, "dashboard", "--port", 0, "--no-open")
    url = dashboard.wait_for("dashboard at ")
    simulation = Command(tmp_path, "simulate", "small.toml", "--no-plots", "--json")
    stream = follow(f"{url}api/v1/stream")
    assert next(stream).event == "hello"
    while not any(run["rounds_done"] > 2 for run in next(stream).data["runs"]):
        pass
    os.kill(dashboard.process.pid, signal.SIGKILL)  # While it streams.
    with pytest.raises(httpx.TransportError):
        list(stream)
    assert json.loads(simulation.end())["model_sha256"] == undisturbed
    dashboard.end(-signal.SIGKILL)
    with RunStore(tmp_path / "runs") as store:
        assert store.run("last").status == "finished"


def test_a_served_run_with_its_dashboard(tmp_path: Path, undisturbed: str) -> None:
    """`turnout server --dashboard`: two clients, and readers that ask all the time."""
    written(tmp_path, tmp_path / "runs")
    address, shown = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    server = Command(
        tmp_path, "server", "small.toml", "--address", address, "--dashboard", shown, "--no-plots", "--json"
    )
    url = server.wait_for("dashboard at ")
    nodes = [
        Command(tmp_path, "client", "--server", address, "--clients", part, "--json")
        for part in ("0-5", "6-11")
    ]
    rounds: list[int] = []
    asking = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url) as client:
            while not asking.is_set():
                try:
                    run = client.get("api/v1/runs").json()["items"][0]["id"]
                    for path in ("clients", "participation", "attention", "rounds?metrics=true", "fairness"):
                        assert client.get(f"api/v1/runs/{run}/{path}").status_code == 200
                except httpx.TransportError:
                    return

    readers = [threading.Thread(target=ask) for _ in range(2)]
    for reader in readers:
        reader.start()
    run = httpx.get(f"{url}api/v1/runs").json()["items"][0]["id"]
    last = ""
    for event in follow(f"{url}api/v1/stream", [("run", run), ("after", "0.0")]):
        last = event.event
        if event.event == "update":
            rounds += [item["round"] for part in event.data["rounds"] for item in part["items"]]
            if rounds and rounds[-1] < 20:
                devices = httpx.get(f"{url}api/v1/runs/{run}/clients").json()["items"]
                assert {item["device"] for item in devices if item["seen"]} != {None}
    asking.set()
    document = json.loads(server.end())
    for node in nodes:
        node.end()
    for reader in readers:
        reader.join()
    assert document["model_sha256"] == undisturbed
    assert last == "bye"
    assert rounds == list(range(1, len(rounds) + 1))
    assert len(rounds) >= 20  # The last ones may be committed while the process is already leaving.


@pytest.mark.parametrize("address", ["taken", "here", "127.0.0.1:99999", "0.0.0.0:0"])
def test_a_dashboard_that_cannot_listen_is_told_before_the_run(tmp_path: Path, address: str) -> None:
    file = written(tmp_path, tmp_path / "runs")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        shown = f"127.0.0.1:{taken.getsockname()[1]}" if address == "taken" else address
        arguments = ["server", str(file), "--address", "127.0.0.1:0", "--dashboard", shown]
        done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert {"taken": "cannot be used", "0.0.0.0:0": "--dashboard-token-file"}.get(
        address, "HOST:PORT"
    ) in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_command_stops_in_time_with_streams_open(own_store: Path, tmp_path: Path) -> None:
    dashboard = Command(
        tmp_path, "dashboard", "--store", own_store, "--port", 0, "--no-open", "--generate-token"
    )
    url = dashboard.wait_for("dashboard at ")
    headers = {"Authorization": f"Bearer {dashboard.wait_for('token: ')}"}
    stream = follow(f"{url}api/v1/stream", headers=headers)
    assert next(stream).event == "hello"
    began = time.monotonic()
    dashboard.process.send_signal(signal.SIGTERM)
    assert [event.event for event in stream][-1] == "bye"
    dashboard.end()
    assert time.monotonic() - began < 5
    assert "Traceback" not in dashboard.log.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--store", "nowhere"), 3, "no run store"),
        (("--host", "0.0.0.0"), 2, "--token-file FILE"),
        (("--token-file", "nothing"), 2, "No such file"),
        (("--tls-cert", "a.pem"), 2, "--tls-key"),
        (("--host", "256.1.1.1.1"), 2, "--token-file"),
    ],
)
def test_what_the_command_refuses(own_store: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    shared = ["dashboard", "--store", str(own_store), "--port", "0", "--no-open"]
    done = CliRunner().invoke(app, [*shared, *arguments])
    assert done.exit_code == code
    assert said in done.stderr


def test_readiness_follows_the_store(own_store: Path) -> None:
    with (
        Dashboard(own_store, DashboardOptions(port=0), catalogue=list) as served,
        httpx.Client(base_url=served.url) as api,
    ):
        assert api.get("readyz").status_code == 200
        assert len(api.get("api/v1/runs").json()["items"]) == 3
        away = own_store.with_name("away")
        own_store.rename(away)
        for path in ("readyz", "api/v1/runs", "api/v1/stream"):
            answer = api.get(path)
            assert answer.status_code == 503, path
            assert answer.json()["error"]["code"] == "store-gone"
            assert str(own_store) not in answer.text
        assert api.get("healthz").status_code == 200
        assert not own_store.exists()  # Asking for it has not made an empty one.
        RunStore(own_store).close()  # Another store in its place is the one that is shown.
        assert api.get("readyz").status_code == 200
        assert api.get("api/v1/runs").json()["items"] == []
        shutil.rmtree(own_store)
        away.rename(own_store)
        assert len(api.get("api/v1/runs").json()["items"]) == 3


def test_a_file_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "turnout.sqlite").write_text("not a database, but long enough to look like a file" * 10)
    with pytest.raises(StoreError, match="cannot be opened"):
        StoreReader(tmp_path)


def test_a_lost_run_is_seen_as_lost(own_store: Path) -> None:
    """Killed without a word: its row says running, but nobody holds its directory."""
    with RunStore(own_store) as store:
        row = store.runs()[0]
        store.reopen(row.id, after_round=5, num_rounds=30, config=row.config)
    with Dashboard(own_store, DashboardOptions(port=0), catalogue=list) as served:
        url = f"{served.url}api/v1/runs"
        everything = httpx.get(url).json()
        (found,) = [item for item in everything["items"] if item["id"] == row.id]
        lost = httpx.get(url, params={"status": "lost"}).json()
        others = httpx.get(url, params={"status": ["running", "stale", "finished"]}).json()
    assert (found["status"], found["rounds_done"]) == ("lost", 5)
    assert [item["id"] for item in lost["items"]] == [row.id]
    assert (others["total"], row.id in [item["id"] for item in others["items"]]) == (2, False)
    assert everything["facets"]["status"] == [
        {"value": "finished", "count": 2}, {"value": "lost", "count": 1}
    ]  # fmt: skip
