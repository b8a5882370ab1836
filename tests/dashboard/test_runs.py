"""Runs, rounds, series, events, comparisons and exports say what the store says."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import httpx
import numpy as np
import pytest
from dashboard_runs import STRATEGIES

from turnout.server import RunStore


def get(api: httpx.Client, path: str, **params: object) -> dict:
    answer = api.get(path, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_list_has_what_the_store_has(api: httpx.Client, store: RunStore) -> None:
    found = get(api, "runs")
    rows = store.runs()
    assert [item["id"] for item in found["items"]] == [row.id for row in rows]
    assert found["total"] == len(rows) == len(STRATEGIES)
    for item, row in zip(found["items"], rows, strict=True):
        series = store.series(row.id, "evaluate", "accuracy")
        head = item["headline"]
        assert (head["name"], head["kind"], head["higher_is_better"]) == ("accuracy", "evaluate", True)
        assert head["sparkline"] == [value for _, value in series]
        assert (head["last_round"], head["last"]) == series[-1]
        assert head["best"] == max(value for _, value in series)
        assert dict(series)[head["best_round"]] == head["best"]
        assert (item["rounds_done"], item["status"], item["strategy"]) == (30, "finished", row.strategy)
    assert {facet["value"] for facet in found["facets"]["strategy"]} == set(STRATEGIES)
    assert found["facets"]["status"] == [{"value": "finished", "count": 3}]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"strategy": "fedau"}, {"fedau"}),
        ({"strategy": ["fedau", "fedavg"]}, {"fedau", "fedavg"}),
        ({"strategy": "fedau", "task": "other"}, set()),
        ({"q": "FEDA digits"}, {"fedavg", "fedau", "fedamd"}),
        ({"q": "fedau shown"}, {"fedau"}),
        ({"q": "100%_"}, set()),
        ({"status": "failed"}, set()),
        ({"status": ["failed", "finished"]}, {"fedavg", "fedau", "fedamd"}),
    ],
)
def test_the_list_can_be_filtered(api: httpx.Client, params: dict, expected: set[str]) -> None:
    found = get(api, "runs", **params)
    assert {item["strategy"] for item in found["items"]} == expected
    assert found["total"] == len(expected)


@pytest.mark.parametrize(
    "sort", ["created", "name", "strategy", "task", "status", "rounds", "seconds", "metric"]
)
def test_the_list_can_be_sorted(api: httpx.Client, sort: str) -> None:
    up = [item["id"] for item in get(api, "runs", sort=sort, order="asc")["items"]]
    down = [item["id"] for item in get(api, "runs", sort=sort, order="desc")["items"]]
    assert sorted(up) == sorted(down)
    assert down == up[::-1]
    if sort == "metric":
        best = [item["headline"]["best"] for item in get(api, "runs", sort=sort, order="asc")["items"]]
        assert best == sorted(best)


def test_one_run(api: httpx.Client, store: RunStore, run: str) -> None:
    found, row = get(api, f"runs/{run}"), store.run(run)
    rounds = store.rounds(run)
    assert found["config"] == row.config
    assert found["directory"] == store.directory_of(row).name
    assert "/" not in found["directory"]
    assert found["environment"]["packages"]["turnout"]
    assert found["model_sha256"] == row.model_sha256
    assert found["totals"]["participants"] == sum(each.participants for each in rounds)
    assert found["totals"]["sent_bytes"] is None  # A simulation counts none.
    assert found["eta_seconds"] is None
    for series in found["series"]:
        assert store.series(run, series["kind"], series["name"])[-1] == (series["last_round"], series["last"])
    recorded = {(metric.kind, metric.name) for metric in store.metrics(run)}
    assert {(each["kind"], each["name"]) for each in found["series"]} == recorded


def test_rounds_have_their_phases_and_metrics(api: httpx.Client, store: RunStore, run: str) -> None:
    items = get(api, f"runs/{run}/rounds", limit=100, metrics=True)["items"]
    rows = store.rounds(run)
    assert [item["round"] for item in items] == [row.round for row in rows]
    for item, row in zip(items, rows, strict=True):
        assert item["seconds"]["train"] == row.train_seconds
        assert item["seconds"]["checkpoint"] == row.checkpoint_seconds
        assert item["participants"] == row.participants
    by_round = {number: value for number, value in store.series(run, "evaluate", "accuracy") if number}
    assert {item["round"]: item["metrics"]["evaluate"]["accuracy"] for item in items
            if item["metrics"]["evaluate"]} == by_round  # fmt: skip
    assert get(api, f"runs/{run}/rounds", limit=1)["items"][0]["metrics"] is None


def test_series(api: httpx.Client, store: RunStore, run: str) -> None:
    names = ["evaluate/accuracy", "round/participants", "round/train-seconds", "train/unknown"]
    found = get(api, f"runs/{run}/series", name=names, points=1000)
    accuracy, participants, seconds, unknown = found["series"]
    assert list(zip(accuracy["rounds"], accuracy["values"], strict=True)) == store.series(
        run, "evaluate", "accuracy"
    )
    rows = store.rounds(run)
    assert participants["values"] == [row.participants for row in rows]
    assert seconds["values"] == [row.train_seconds for row in rows]
    assert (unknown["rounds"], unknown["total"]) == ([], 0)
    assert all(series["exact"] for series in found["series"])
    spent = [
        row.select_seconds + row.train_seconds + row.finish_seconds + row.evaluate_seconds
        + (row.checkpoint_seconds or 0.0)
        for row in rows
    ]  # fmt: skip
    clock = dict(zip(found["clock_rounds"], found["seconds"], strict=True))
    assert clock[0] == 0
    assert math.isclose(clock[30], sum(spent))
    assert math.isclose(clock[12], sum(spent[:12]))


def test_a_long_series_is_thinned_out(api: httpx.Client, run: str) -> None:
    (series,) = get(api, f"runs/{run}/series", name="round/train-seconds", points=8)["series"]
    (whole,) = get(api, f"runs/{run}/series", name="round/train-seconds")["series"]
    assert len(series["rounds"]) <= 8
    assert not series["exact"]
    assert series["total"] == len(whole["rounds"]) == 30
    assert {min(whole["values"]), max(whole["values"])} <= set(series["values"])


def test_events(api: httpx.Client, store: RunStore, run: str) -> None:
    found = get(api, f"runs/{run}/events")
    rows = store.events(run)
    assert [(item["id"], item["kind"], item["message"]) for item in found["items"]] == [
        (row.id, row.kind, row.message) for row in rows
    ]
    again = get(api, f"runs/{run}/events", after=found["next"])
    assert again["items"] == []
    assert again["next"] == found["next"]
    assert len(get(api, "events")["items"]) == 2 * len(STRATEGIES)


def test_comparison(api: httpx.Client, store: RunStore) -> None:
    runs = [row.id for row in store.runs()]
    found = get(api, "compare", run=runs, target=0.3)
    assert (found["kind"], found["name"], found["axis"]) == ("evaluate", "accuracy", "round")
    for series, line, run in zip(found["series"], found["table"], runs, strict=True):
        values = store.series(run, "evaluate", "accuracy")
        drawn = [(x, y) for x, y in zip(found["x"], series["values"], strict=True) if y is not None]
        assert drawn == values
        assert (line["last_round"], line["last"]) == values[-1]
        reached = [number for number, value in values if value >= 0.3]
        assert line["rounds_to_target"] == (reached[0] if reached else None)
    by_time = get(api, "compare", run=runs, x="seconds", metric="train/train-loss")
    assert by_time["x"] == sorted(by_time["x"])
    assert not by_time["higher_is_better"]
    by_bytes = get(api, "compare", run=runs, x="bytes")  # Nobody counts them in a simulation.
    assert by_bytes["x"] == []
    assert "evaluate/loss" in found["available"]


def test_differences_of_two_runs(api: httpx.Client, store: RunStore) -> None:
    one, other = (row for row in store.runs() if row.strategy in ("fedavg", "fedau"))
    found = get(api, "diff", left=one.id, right=other.id)
    paths = {each["path"]: each for each in found["differences"]}
    assert paths["strategy.name"]["left"] == one.config["strategy"]["name"]
    assert paths["strategy.name"]["right"] == other.config["strategy"]["name"]
    assert paths["strategy.cutoff"]["has_left"] != paths["strategy.cutoff"]["has_right"]
    assert not any(path.startswith("task.") for path in paths)
    assert get(api, "diff", left=one.id, right=one.id)["differences"] == []


def test_methods(api: httpx.Client) -> None:
    found = get(api, "methods")
    assert found["kinds"] == ["strategy", "task"]
    assert found["items"][0]["url"] == "https://arxiv.org/abs/2306.03401"
    assert found["items"][1]["url"] is None
    assert [item["slug"] for item in get(api, "methods", kind="task")["items"]] == ["digits"]


def test_the_command_lists_the_real_methods() -> None:
    from turnout.cli.dashboard import method_catalogue

    entries = method_catalogue()
    assert {"fedau", "fedstale", "fedamd"} <= {entry["slug"] for entry in entries}
    assert all(entry["summary"] for entry in entries)


@pytest.mark.parametrize("table", ["rounds", "metrics", "clients"])
def test_exports(api: httpx.Client, store: RunStore, run: str, table: str) -> None:
    rows = list(csv.DictReader(io.StringIO(api.get(f"runs/{run}/export/{table}.csv").text)))
    documents = json.loads(api.get(f"runs/{run}/export/{table}.json").text)
    count = {"rounds": store.rounds, "metrics": store.metrics, "clients": store.client_rounds}[table](run)
    assert len(rows) == len(documents) == len(count)
    if table == "rounds":
        assert [float(row["train_seconds"]) for row in rows] == [row.train_seconds for row in count]
    if table == "clients":
        assert [(int(row["round"]), int(row["client"]), row["role"]) for row in rows] == [
            (row.round, row.client, row.role) for row in count
        ]


def test_export_of_all_runs(api: httpx.Client, store: RunStore) -> None:
    answer = api.get("export/runs.csv")
    assert answer.headers["content-disposition"] == 'attachment; filename="runs.csv"'
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["id"] for row in rows] == [row.id for row in reversed(store.runs())]


def test_the_store_is_never_written(own_store: Path) -> None:
    from turnout.dashboard import StoreReader
    from turnout.server.schema import SCHEMA_REVISION

    reader = StoreReader(own_store)
    with (
        pytest.raises(Exception, match="readonly database"),
        reader.connect() as connection,
    ):
        connection.exec_driver_sql("DELETE FROM runs")
    with reader.connect() as connection:
        assert (
            connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() == SCHEMA_REVISION
        )
        assert connection.exec_driver_sql("SELECT count(*) FROM runs").scalar() == 3
    reader.close()


def test_the_numbers_of_a_round_add_up(api: httpx.Client, run: str) -> None:
    names = [f"round/{name}" for name in ("invited", "participants", "failed", "rejected", "missing")]
    values = [np.array(series["values"]) for series in get(api, f"runs/{run}/series", name=names)["series"]]
    assert (values[0] == sum(values[1:])).all()
