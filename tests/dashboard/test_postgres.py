"""The same rows in SQLite and in PostgreSQL give the same answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from dashboard_runs import commit, follow, written_run
from sqlalchemy import create_engine, text

from turnout.dashboard import Dashboard, DashboardOptions
from turnout.server import RunStore, database
from turnout.server.schema import Base

PATHS = (
    "runs/one/rounds?metrics=true",
    "runs/one/series?name=evaluate/accuracy&name=round/participants&points=20",
    "runs/one/participation", "runs/one/participation?rows=3&columns=9", "runs/one/participation/layout",
    "runs/one/clients", "runs/one/clients/2", "runs/one/clients/2/rounds", "runs/one/fairness",
    "runs/one/attention", "runs/one/export/clients.csv", "runs/one/export/metrics.json",
    "runs?q=wri&sort=metric", "runs?sort=rounds",
    "compare?run=one&run=two&x=seconds", "diff?left=one&right=two",
)  # fmt: skip
MOMENTS = ("created_at", "heartbeat_at", "finished_at", "committed_at")


@pytest.fixture
def postgres() -> Iterator[str]:
    url = os.environ.get("TURNOUT_TEST_POSTGRES")
    if not url:
        pytest.skip("set TURNOUT_TEST_POSTGRES to the URL of an empty PostgreSQL database")
    yield url
    engine = create_engine(database.store_url(url))
    with engine.begin() as connection:
        Base.metadata.drop_all(connection)
        connection.execute(text("DROP TABLE alembic_version"))
    engine.dispose()


def fill(store: RunStore) -> None:
    for run in ("one", "two"):
        written_run(store, run, num_clients=7, config={"strategy": {"name": run}}, status="running")
        for number in range(1, 80):
            outcomes = {client: "ok" for client in range(7) if number % (client + 1) == 0}
            outcomes[6] = "failed" if number % 2 else "missing"
            commit(
                store, run, number, outcomes, measured={"accuracy": number / 100, "loss": 1 / number},
                role="anchor" if number % 3 else "miner", metrics={"accuracy": 0.5, "gpu-utilization": 0.25},
            )  # fmt: skip
        store.finish(run, "finished", seconds=1.0)


def without_moments(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_moments(item) for key, item in value.items() if key not in MOMENTS}
    return [without_moments(item) for item in value] if isinstance(value, list) else value


def answers(location: str | Path) -> list[object]:
    options = DashboardOptions(port=0)
    with (
        Dashboard(location, options, catalogue=list) as served,
        httpx.Client(base_url=f"{served.url}api/v1/", timeout=30) as api,
    ):
        found: list[object] = []
        for path in PATHS:
            answer = api.get(path)
            assert answer.status_code == 200, (path, answer.text)
            json = answer.headers["content-type"] == "application/json"
            found.append(without_moments(answer.json()) if json else answer.content)
        assert api.get("runs", params={"strategy": "nul\x00"}).status_code in (200, 422)
        assert httpx.get(f"{served.url}readyz").status_code == 200
        stream = follow(f"{served.url}api/v1/stream", [("run", "one"), ("after", "0.0")])
        rounds: list[int] = []
        while len(rounds) < 79:
            event = next(stream)
            rounds += [item["round"] for part in event.data.get("rounds", ()) for item in part["items"]]
        with RunStore(location) as store:
            commit(store, "one", 80, {0: "ok"})
            while rounds[-1] < 80:
                event = next(stream)
                rounds += [item["round"] for part in event.data.get("rounds", ()) for item in part["items"]]
        assert rounds == list(range(1, 81))
        stream.close()
    return found


def test_both_databases_answer_alike(tmp_path: Path, postgres: str) -> None:
    for location in (tmp_path, postgres):
        with RunStore(location) as store:
            fill(store)
    for path, one, other in zip(PATHS, answers(tmp_path), answers(postgres), strict=True):
        assert one == other, path
