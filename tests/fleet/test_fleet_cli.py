"""``turnout server`` and ``turnout client`` as real processes: equal to a simulation, stopped, resumed."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from turnout.experiment import load_experiment
from turnout.experiment.build import build, make_task
from turnout.experiment.recorded import RunSummary
from turnout.experiment.sections import FleetSection
from turnout.experiment.serve import for_clients
from turnout.server import RunStore, model_sha256
from turnout.simulation import LocalGrid
from turnout.simulation.run import simulate
from turnout.strategies import FedAvg
from turnout.wire import ConfigError
from turnout.wire.model_file import read_model

PATIENCE = 90.0
EXPERIMENT = """
[run]
name = "small"
rounds = 3

[task]
name = "digits"
model = "softmax"
num_clients = 6
partition = "label-mix"
min_examples = 1

[client]
lr = 0.1
batch_size = 16
local_steps = 2

[strategy]
name = "fedavg"

[participation]
model = "bernoulli"
probabilities = { kind = "label-correlated", mean = 0.6, minimum = 0.3, alpha = 0.5 }
"""
OWN_APP = """
import time
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from turnout.wire import as_array, view

app = ClientApp()
text = "no app"

@app.train()
def train(message, context):
    time.sleep(float(open("pause").read()))
    client = int(context.node_config["partition-id"])
    count = context.state["count"]["n"] if "count" in context.state else 0.0
    context.state["count"] = MetricRecord({"n": count + 1})
    rng = np.random.default_rng([client, int(message.content["config"]["server-round"])])
    arrays = ArrayRecord()
    for name, array in message.content["arrays"].items():
        value = view(array)
        step = rng.standard_normal(value.shape).astype(value.dtype)
        arrays[name] = as_array(value + step * np.float32(1 + count))
    metrics = MetricRecord({"num-examples": 1 + client, "client-id": client})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
"""
OWN = """
[run]
rounds = 6
[task]
name = "external"
model = "initial.safetensors"
num_clients = 2
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Command:
    """A running ``turnout`` command."""

    def __init__(self, place: Path, name: str, arguments: list[str]) -> None:
        self.errors = place / f"{name}.err"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "turnout.cli", *arguments],
                cwd=place,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "COLUMNS": "200"},
            )

    def said(self) -> str:
        return self.errors.read_text()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while text not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, f"no {text!r} in: {self.said()}"
            time.sleep(0.02)

    def end(self, code: int = 0) -> dict[str, Any]:
        """Wait for the end; return the last line of JSON (empty without one)."""
        out, _ = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == code, self.said()
        return json.loads(out.splitlines()[-1]) if out.strip() else {}

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


Turnout = Callable[..., Command]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "small.toml").write_text(EXPERIMENT)
    return tmp_path


@pytest.fixture
def turnout(place: Path) -> Iterator[Turnout]:
    """Start commands in ``place``; what is left of them ends with the test."""
    started: list[Command] = []

    def start(*arguments: object) -> Command:
        words = [str(argument) for argument in arguments]
        started.append(Command(place, f"{len(started)}-{words[0]}", words))
        return started[-1]

    yield start
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
        command.process.communicate()


def simulated(place: Path, *overrides: str) -> RunSummary:
    folder = f"run.directory={place / 'simulated'}"
    return simulate(load_experiment(place / "small.toml", [folder, *overrides]), plots=False)


@pytest.mark.parametrize("slug", ["fedavg", "fedstale", "fedamd", "rerce-fed", "scaffold"])
def test_a_served_run_equals_the_simulated_one(slug: str, turnout: Turnout, place: Path) -> None:
    address, chosen = f"127.0.0.1:{free_port()}", f"strategy.name={slug}"
    server = turnout("server", "small.toml", "--set", chosen, "--address", address, "--json", "--no-plots")
    # One is sent the experiment, the other has the file.
    nodes = [
        turnout("client", "--server", address, "--clients", "0-2", "--json"),
        turnout("client", "--server", address, "--clients", "3-5", "small.toml", "--workers", "2", "--json"),
    ]
    expected = simulated(place, chosen)
    document = server.end()
    assert list(document) == ["run_id", "rounds", "metrics", "model_sha256", "seconds"]
    assert document["model_sha256"] == expected.model_sha256
    assert document["metrics"] == expected.metrics
    ended = [node.end() for node in nodes]
    assert {node["reason"] for node in ended} == {"the run is over"}
    for said in ("of 6 clients connected", "turnout client --server", "round 3/3", "waits for those clients"):
        assert said in server.said()


def own(place: Path, pause: float) -> None:
    """Write an experiment whose clients bring a NumPy app, and their app."""
    import numpy as np
    from safetensors.numpy import save_file

    save_file(
        {"w": np.zeros(50, np.float32), "a": np.ones((2, 3), np.float32)}, place / "initial.safetensors"
    )
    (place / "own.toml").write_text(OWN)
    (place / "own_app.py").write_text(OWN_APP)
    (place / "pause").write_text(str(pause))


def undisturbed(place: Path) -> str:
    """Return the digest of the model that the own app's clients end with, run in this process."""
    app = runpy.run_path(str(place / "own_app.py"))["app"]
    grid = LocalGrid(app, 2, seed=0)
    result = FedAvg(seed=0).start(grid, read_model(place / "initial.safetensors"), num_rounds=6)
    return model_sha256(result.arrays)


def start_own(turnout: Turnout, address: str, *more: object) -> Command:
    return turnout("server", *more, "--address", address, "--json", "--no-plots")


def own_nodes(turnout: Turnout, address: str) -> list[Command]:
    shared = ("client", "--server", address, "--app", "own_app:app", "--json", "--clients")
    return [turnout(*shared, client) for client in (0, 1)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_to_the_same_model(
    number: signal.Signals, turnout: Turnout, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    own(place, 0)
    expected = undisturbed(place)
    (place / "pause").write_text("0.4")
    address = f"127.0.0.1:{free_port()}"
    server = start_own(turnout, address, "own.toml")
    nodes = own_nodes(turnout, address)
    server.wait_for("round 1/6")
    server.signal(number)
    server.end({signal.SIGTERM: 0, signal.SIGKILL: -9, signal.SIGINT: 130}[number])
    with RunStore(place / "runs") as store:
        run = store.run("last")
        assert run.status == ("running" if number == signal.SIGKILL else "interrupted")
    if number != signal.SIGKILL:
        assert f"turnout server --resume {run.id} --address {address}" in server.said()
    assert all(node.process.poll() is None for node in nodes)
    (place / "initial.safetensors").unlink()  # The run has its own copy.
    resumed = start_own(turnout, address, "--resume", run.id).end()
    assert resumed["run_id"] == run.id
    assert resumed["model_sha256"] == expected
    assert [node.end()["reason"] for node in nodes] == ["the run is over"] * 2
    again = start_own(turnout, address, "--resume", run.id)
    again.end(2)
    assert "is finished after 6 rounds" in again.said()


def test_waiting_for_clients_ends_at_a_signal_or_in_time(turnout: Turnout, place: Path) -> None:
    own(place, 0)
    waiting = start_own(turnout, f"127.0.0.1:{free_port()}", "own.toml", "--set", "run.directory=a")
    limited = start_own(
        turnout, f"127.0.0.1:{free_port()}", "own.toml", "--set", "run.directory=b", "--set", "fleet.wait=0.5"
    )
    waiting.wait_for("Clients:")
    waiting.signal(signal.SIGTERM)
    waiting.end(0)
    limited.end(4)
    assert "after 0.5 seconds only 0 are connected" in limited.said()


def test_a_run_and_an_address_have_one_server(turnout: Turnout, place: Path) -> None:
    own(place, 0)
    address = f"127.0.0.1:{free_port()}"
    first = start_own(turnout, address, "own.toml")
    first.wait_for("Clients:")
    here = start_own(turnout, address, "own.toml")
    measured = start_own(turnout, "127.0.0.1:0", "own.toml", "--metrics-address", address)
    same = start_own(turnout, f"127.0.0.1:{free_port()}", "--resume", "last")
    for refused in (here, measured, same):
        refused.end(3)
    assert f"--address {address} cannot be used" in here.said()
    assert f"metrics address '{address}' cannot be used" in measured.said()
    assert "in use by another process" in same.said()
    first.signal(signal.SIGINT)
    first.end(130)
    assert len(list((place / "runs").glob("*/experiment.toml"))) == 1


def test_certificates_made_by_the_command_line(turnout: Turnout, place: Path) -> None:
    own(place, 0)
    turnout("certs", "init", "pki").end()
    turnout("certs", "client", "edge-1", "edge-2", "--dir", "pki").end()
    shown = turnout("certs", "show", "pki", "--json")
    rows = json.loads(shown.process.communicate(timeout=PATIENCE)[0])
    assert [row["name"] for row in rows][1:] == ["edge-1", "edge-2", "server"]
    address = f"127.0.0.1:{free_port()}"
    server = turnout("server", "own.toml", "--address", address, "--certs", "pki", "--json", "--no-plots")
    server.wait_for("TLS both ways")
    (place / "pki" / "edge-3.pem").write_bytes((place / "pki" / "edge-1.pem").read_bytes())
    (place / "pki" / "edge-3.key").write_bytes((place / "pki" / "edge-1.key").read_bytes())
    (place / "pki" / "edge-3.key").chmod(0o600)
    shared = ("client", "--server", address, "--app", "own_app:app", "--json", "--certs", "pki", "--name")
    impostor = turnout(*shared, "edge-3", "--clients", "0")
    impostor.end(3)
    assert "wrong-name" in impostor.said()
    plain = turnout("client", "--server", address, "--app", "own_app:app", "--connect-timeout", "1")
    plain.end(3)
    nodes = [turnout(*shared, f"edge-{at + 1}", "--clients", at) for at in (0, 1)]
    assert server.end()["rounds"] == 6
    for node in nodes:
        node.end()


def test_clients_are_chosen_by_what_they_say_of_themselves(turnout: Turnout, place: Path) -> None:
    own(place, 0)
    with (place / "own.toml").open("a") as file:
        file.write('[fleet]\nparticipation = "live"\ntags = { site = "north" }\n')
    address = f"127.0.0.1:{free_port()}"
    server = start_own(turnout, address, "own.toml")
    shared = ("client", "--server", address, "--app", "own_app:app", "--json", "--clients")
    south = turnout(*shared, "1", "--tag", "site=south")
    server.wait_for("1 of 2 clients connected")
    north = turnout(*shared, "0", "--tag", "site=north", "--tag", "rack=4", "--max-rounds", "9")
    server.end()
    assert (north.end()["replies"], south.end()["replies"]) == (6, 0)


def test_a_client_without_a_server_gives_up(turnout: Turnout, place: Path) -> None:
    own(place, 0)
    address = f"127.0.0.1:{free_port()}"
    lonely = turnout(
        "client", "--server", address, "--app", "own_app:app", "--connect-timeout", "0.5", "--json"
    )
    waiting = turnout("client", "--server", address, "--app", "own_app:app", "--json", "-v")
    lonely.end(3)
    assert "took this node within 0.5 seconds" in lonely.said()
    waiting.wait_for("the stream was lost")
    waiting.signal(signal.SIGTERM)
    assert waiting.end()["reason"] == "SIGTERM"


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


def test_only_clients_with_enough_examples_are_asked(turnout: Turnout, place: Path) -> None:
    task = make_task(load_experiment(place / "small.toml"))
    sizes = sorted(task.num_examples(client) for client in range(6))
    address = f"127.0.0.1:{free_port()}"
    rules = [
        "fleet.participation=live",
        f"fleet.min_examples={sizes[2]}",
        "fleet.min_clients=2",
        "run.rounds=1",
    ]
    settings = [word for rule in rules for word in ("--set", rule)]
    server = turnout("server", "small.toml", *settings, "--address", address, "--json", "--no-plots")
    # One is sent the experiment, the other has the file; both learn their sizes from the data.
    turnout("client", "--server", address, "--clients", "0-2")
    turnout("client", "--server", address, "--clients", "3-5", "small.toml")
    run_id = server.end()["run_id"]
    with RunStore(place / "runs") as store:
        asked = {row.client for row in store.client_rounds(run_id)}
    assert len(asked) >= 2
    assert all(task.num_examples(client) >= sizes[2] for client in asked)


def test_a_task_of_clients_own_cannot_be_simulated(place: Path) -> None:
    own(place, 0)
    settings = f"task.model={place / 'initial.safetensors'}"
    with pytest.raises(ConfigError, match=r"own.toml:5.*cannot be simulated.*turnout client --app"):
        build(load_experiment(place / "own.toml", [settings]))
    (place / "initial.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"model=.*cannot be read.*Name a safetensors file"):
        make_task(load_experiment(place / "own.toml", [settings]))


def test_a_resumed_server_waits_without_torch_and_shows_metrics(turnout: Turnout, place: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    first = turnout("server", "small.toml", "--address", address, "--no-plots")
    first.wait_for("Clients:")
    first.signal(signal.SIGTERM)
    first.end(0)
    metrics = free_port()
    again = start_own(turnout, address, "--resume", "last", "--metrics-address", f"127.0.0.1:{metrics}")
    again.wait_for("Clients:")
    assert "libtorch" not in Path(f"/proc/{again.process.pid}/maps").read_text()
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=PATIENCE) as answer:
        assert b"turnout_clients_connected 0" in answer.read()
    again.signal(signal.SIGTERM)
    again.end(0)


def test_a_node_with_its_own_app_needs_no_torch(place: Path) -> None:
    own(place, 0)
    script = (
        "import sys; from turnout.cli.client import load_app; from turnout.client.node import run_node; "
        "load_app('own_app:app'); import turnout.client; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=place, check=True, timeout=PATIENCE)
