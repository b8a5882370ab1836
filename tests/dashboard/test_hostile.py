"""Hostile content and hostile requests: text stays text, paths stay inside, nothing ends in a 5xx."""

from __future__ import annotations

import csv
import io
import json
import socket
import string
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from dashboard_runs import commit, follow, sse_events, written_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turnout.dashboard import Dashboard, DashboardOptions
from turnout.server import ClientRow, RunStore

NAMES = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>",
    "line\nbreak\r\nand\ttab",
    "\u202egpj.exe\u202c right to left",
    "nul\x00inside",
    "=HYPERLINK(\"http://evil\",\"x\")",
    "@SUM(1)", "+1", "-1", "\ttab first",
    "separators \u2028 \u2029 \x85 \x0b \x1c",
    "emoji 👩‍🔬 and \U0010ffff",
    "${jndi:ldap://x} {{7*7}} %s %n",
    "../../etc/passwd",
    "x" * 10_000,
)  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunStore, Dashboard]]:
    """A run per name, which is everywhere that a name can be."""
    folder = tmp_path_factory.mktemp("hostile")
    with RunStore(folder) as store:
        for number, name in enumerate(NAMES):
            run = written_run(
                store, f"h{number}", name=name, strategy=name, task=name, study=name, directory=name,
                error=name, status="failed", config={name: {"value": name, "nan": float("inf")}},
            )  # fmt: skip
            member = {
                "client": 0, "name": name, "device": name, "examples": 1, "tags": {name: name}, "offences": 1,
            }  # fmt: skip
            commit(
                store, run, 1, {0: "ok", 1: "failed"}, measured={name: 0.5, "accuracy": float("inf")},
                role=name, reason=name, metrics={name: 1.0},
            )  # fmt: skip
            with store._writer.begin() as connection:
                from datetime import UTC, datetime

                connection.execute(
                    ClientRow.__table__.insert(), {"run_id": run, "updated_at": datetime.now(UTC), **member}
                )
        with Dashboard(folder, DashboardOptions(port=0), catalogue=list) as served:
            yield store, served


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_names_come_through_as_inert_json(hostile: tuple[RunStore, Dashboard], number: int) -> None:
    _, served = hostile
    name, run = NAMES[number], f"h{number}"
    with httpx.Client(base_url=f"{served.url}api/v1/") as api:

        def get(path: str, **params: object) -> object:
            answer = api.get(path, params=params)
            assert answer.status_code == 200, answer.text
            assert answer.headers["content-type"] == "application/json"
            return json.loads(answer.text, parse_constant=pytest.fail)  # No NaN, no Infinity.

        detail = get(f"runs/{run}")
        assert (detail["name"], detail["error_text"]) == (name, name)
        assert detail["config"] == {name: {"value": name, "nan": None}}
        assert ".." not in detail["directory"]
        assert get("runs", limit=50)["total"] == len(NAMES)
        if len(name) <= 200:
            assert [item["id"] for item in get("runs", strategy=name)["items"]] == [run]
        assert get(f"runs/{run}/clients")["items"][0]["name"] == name
        assert get(f"runs/{run}/clients/0")["tags"] == {name: name}
        assert get(f"runs/{run}/clients/1/rounds")["items"][0]["reason"] == name[-8000:]
        assert get(f"runs/{run}/participation/layout")["roles"] == ["", name]
        assert get(f"runs/{run}/rounds", metrics=True)["items"][0]["metrics"]["evaluate"][name] == 0.5
        if len(name) <= 64 and name.strip():
            assert get(f"runs/{run}/fairness", metric=name)["metric"] == name
        assert get("diff", left=run, right="h0")["left"] == run
        assert f"evaluate/{name}" in get("compare", run=run)["available"]


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_names_survive_the_stream(hostile: tuple[RunStore, Dashboard], number: int) -> None:
    """JSON must not be torn apart at what other alphabets take for the end of a line."""
    _, served = hostile
    run = f"h{number}"
    stream = follow(f"{served.url}api/v1/stream", [("run", run), ("after", "0.0")])
    next(stream)
    event = next(stream)
    assert event.data["runs"][0]["name"] == NAMES[number]
    assert event.data["rounds"][0]["items"][0]["metrics"]["evaluate"][NAMES[number]] == 0.5


def test_no_spreadsheet_runs_what_a_run_is_called(hostile: tuple[RunStore, Dashboard]) -> None:
    _, served = hostile
    for path in ("export/runs.csv", *(f"runs/h{n}/export/clients.csv" for n in range(len(NAMES)))):
        text = httpx.get(f"{served.url}api/v1/{path}").text
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        assert rows
        for row in rows:
            for column, value in row.items():
                numeric = column in ("value", "weight", "train_loss")
                assert numeric or not value.startswith(("=", "+", "-", "@", "\t", "\r")), (path, column)
    for number in range(len(NAMES)):
        (row, *_) = json.loads(httpx.get(f"{served.url}api/v1/runs/h{number}/export/clients.json").text)
        assert row["role"] == NAMES[number]


@pytest.mark.parametrize(
    "path",
    [
        "runs/unknown", "runs/unknown/rounds", "runs/unknown/clients", "runs/unknown/clients/1",
        "runs/unknown/participation", "runs/unknown/fairness", "runs/unknown/attention",
        "runs/unknown/events",
        "runs/unknown/series?name=train/x", "runs/unknown/export/rounds.csv", "compare?run=unknown",
        "diff?left=unknown&right=unknown", "stream?run=unknown", "runs/h0/clients/77",
        "runs/h0/clients/77/rounds", "runs/h0/fairness?metric=unknown", "nothing", "runs/h0/nothing",
    ],
)  # fmt: skip
def test_what_is_not_there_is_404(hostile: tuple[RunStore, Dashboard], path: str) -> None:
    answer = httpx.get(f"{hostile[1].url}api/v1/{path}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not-found"


@pytest.mark.parametrize(
    "path",
    [
        "runs?limit=501", "runs?limit=0", "runs?limit=-1", "runs?limit=1e9",
        "runs?offset=99999999999999999999",
        "runs?sort=password", "runs?status=nice", f"runs?q={'x' * 201}", f"runs?{'task=x&' * 51}",
        "runs/h0/rounds?after=-1", "runs/h0/rounds?after=4294967296", "runs/h0/series",
        "runs/h0/series?name=x",
        f"runs/h0/series?{'name=train/x&' * 33}", "runs/h0/series?name=train/x&points=3",
        "runs/h0/series?name=train/x&points=999999999", "runs/h0/participation?rounds=1",
        "runs/h0/participation?rounds=a:b", "runs/h0/participation?rounds=1:9999999999",
        "runs/h0/participation?rows=0", "runs/h0/participation?columns=100000", "runs/h0/clients/-1",
        "runs/h0/clients/18446744073709551616", "runs/h0/clients/x",
        "runs/h0/events?after=9223372036854775808",
        f"compare?{'run=h0&' * 9}", "compare", "compare?run=h0&target=nan", "compare?run=h0&x=money",
        "diff?left=h0", "runs/h0/export/passwords.csv", "runs/h0/export/rounds.xls", "stream?run=" + "x" * 65,
        "runs/" + "x" * 65, "runs/%00", "runs/a%20b",
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_422(hostile: tuple[RunStore, Dashboard], path: str) -> None:
    answer = httpx.get(f"{hostile[1].url}api/v1/{path}")
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["code"] == "invalid"
    assert error["fields"]
    assert len(answer.content) < 20_000


@pytest.mark.parametrize("client", ["18446744073709551615", "9223372036854775808"])
def test_the_largest_ids(tmp_path: Path, client: str) -> None:
    with RunStore(tmp_path) as store:
        run = written_run(store, "ids", num_clients=1)
        commit(store, run, 1, {int(client): "ok", 5: "ok"})
        with Dashboard(tmp_path, DashboardOptions(port=0), catalogue=list) as served:
            url = f"{served.url}api/v1/runs/{run}"
            assert [item["client"] for item in httpx.get(f"{url}/clients").json()["items"]] == ["5", client]
            assert httpx.get(f"{url}/clients/{client}").json()["seen"] == 1
            assert httpx.get(f"{url}/clients/{client}/rounds").json()["items"][0]["client"] == client
            assert client in httpx.get(f"{url}/export/clients.csv").text


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.text(alphabet=string.printable + "éИ\u202e%", max_size=60))
def test_no_path_is_a_mistake_of_the_server(served: Dashboard, path: str) -> None:
    quoted = "".join(
        c if c.isalnum() or c in "/.%" else f"%{byte:02x}" for c in path for byte in c.encode()[:1]
    )
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(f"GET /{quoted} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        status = int(connection.recv(64).split()[1])
    assert status < 500, quoted


def test_the_stream_parser_of_these_tests_sees_torn_json() -> None:
    torn = iter(['data: "a', 'data: b"', ""])
    with pytest.raises(json.JSONDecodeError):
        list(sse_events(torn))
