"""``turnout server`` and ``turnout client`` as real processes: equal to a simulation, stopped, resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from fleet_commands import (
    PATIENCE,
    Turnout,
    free_port,
    own,
    own_nodes,
    simulated,
    start_own,
    undisturbed,
)

from turnout.experiment import load_experiment
from turnout.experiment.build import make_task
from turnout.server import RunStore
from turnout.simulation.run import simulate

EXAMPLE = Path(__file__).parents[2] / "examples" / "fleet.toml"


# A memory on the server, and one at the clients: test_fleet_equality.py has all strategies, in one process.
@pytest.mark.parametrize("slug", ["fedstale", "scaffold"])
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


def test_the_example_ends_as_its_first_lines_promise(turnout: Turnout, place: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    chosen = (EXAMPLE, "--set", "run.rounds=3", "--json", "--no-plots")
    server = turnout("server", *chosen, "--address", address)
    nodes = [turnout("client", "--server", address, "--clients", ids, "--json") for ids in ("0-2", "3-5")]
    expected = simulate(
        load_experiment(EXAMPLE, ["run.rounds=3", f"run.directory={place / 'simulated'}"]), plots=False
    )
    document = server.end()
    assert (document["rounds"], document["model_sha256"]) == (3, expected.model_sha256)
    assert document["metrics"] == expected.metrics
    assert [node.end()["reason"] for node in nodes] == ["the run is over"] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_to_the_same_model(
    number: signal.Signals, turnout: Turnout, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    own(place, 0)
    expected = undisturbed(place)
    (place / "pause").write_text("0.2")
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
    # The clients' own app computes: the server is there without PyTorch, also of a new run.
    assert "libtorch" not in Path(f"/proc/{first.process.pid}/maps").read_text()
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
        "import sys; from turnout.experiment.own_app import load_app; "
        "from turnout.client.node import run_node; "
        "load_app('own_app:app'); import turnout.client; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=place, check=True, timeout=PATIENCE)
