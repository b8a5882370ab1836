"""Clients: their table, one in full, how a number is spread over them, who needs attention."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from dashboard_runs import commit, written_run

from turnout.dashboard import Dashboard, DashboardOptions
from turnout.dashboard.queries.fairness import gini
from turnout.server import RunStore


def get(api: httpx.Client, path: str, **params: object) -> Any:
    answer = api.get(path, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_table_is_what_the_invitations_say(api: httpx.Client, store: RunStore, run: str) -> None:
    items = get(api, f"runs/{run}/clients", limit=500)["items"]
    assert [item["client"] for item in items] == [str(client) for client in range(12)]
    rows = store.client_rounds(run)
    weight = sum(row.weight or 0.0 for row in rows if row.outcome == "ok")
    for item in items:
        mine = [row for row in rows if row.client == int(item["client"])]
        taken = [row for row in mine if row.outcome == "ok"]
        assert (item["invited"], item["seen"]) == (len(mine), len(taken))
        assert item["participation"] == len(taken) / 30
        assert item["last_round"] == taken[-1].round
        assert item["staleness"] == 30 - taken[-1].round
        assert item["train_loss"] == taken[-1].train_loss
        assert item["examples"] == taken[-1].num_examples
        came = [0, *(row.round for row in taken), 30]
        assert item["max_staleness"] == max(np.diff(came))
        own = sum(row.weight or 0.0 for row in taken)
        assert item["mean_weight"] == pytest.approx(own / len(taken), rel=1e-5)
        assert item["weight_share"] == pytest.approx(own / weight, rel=1e-5)
        assert item["gpu_utilization"] is None  # Nobody has measured it: no zero stands for that.


@pytest.mark.parametrize(
    ("sort", "key"),
    [("participation", "participation"), ("staleness", "staleness"), ("train-loss", "train_loss"),
     ("weight-share", "weight_share"), ("num-examples", "examples"), ("update-norm", "update_norm")],
)  # fmt: skip
def test_the_table_can_be_sorted(api: httpx.Client, run: str, sort: str, key: str) -> None:
    for order in ("asc", "desc"):
        values = [item[key] for item in get(api, f"runs/{run}/clients", sort=sort, order=order)["items"]]
        assert values == sorted(values, reverse=order == "desc")


def test_clients_can_be_searched(api: httpx.Client, run: str) -> None:
    found = get(api, f"runs/{run}/clients", q="1")
    assert [item["client"] for item in found["items"]] == ["1", "10", "11"]
    assert found["total"] == 3
    assert get(api, f"runs/{run}/clients", q="x")["items"] == []


def test_one_client(api: httpx.Client, store: RunStore, run: str) -> None:
    found = get(api, f"runs/{run}/clients/3")
    rows = [row for row in store.client_rounds(run) if row.client == 3]
    assert found["metrics"] == rows[-1].metrics
    assert found["metrics_round"] == rows[-1].round
    counts = {role: {"ok": sum(row.role == role for row in rows)} for role in {row.role for row in rows}}
    assert found["outcomes_by_role"] == counts
    history = get(api, f"runs/{run}/clients/3/rounds", order="asc", limit=500)
    assert [(item["round"], item["role"], item["train_loss"]) for item in history["items"]] == [
        (row.round, row.role, row.train_loss) for row in rows
    ]
    assert history["next"] is None


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A run in which each client has its own way of being a problem."""
    folder = tmp_path_factory.mktemp("troubled")
    with RunStore(folder) as store:
        run = written_run(store, "troubled", num_clients=8)
        for number in range(1, 41):
            every: dict[int, str] = dict.fromkeys((4, 5, 6), "ok")
            every[1] = "failed" if number % 2 else "ok"
            every[2] = "missing" if number % 10 else "ok"
            if number < 5:
                every[0] = "ok"
            commit(store, run, number, every, measured={"accuracy": number / 40})
        commit(store, run, 41, {4: "ok", 6: "ok"})
        for client, columns in {
            5: {"weight": 40.0, "train_seconds": 9.0, "metrics": {"accuracy": 0.25, "client-id": 5.0}},
            6: {"update_norm": 50.0, "metrics": {"accuracy": 0.75, "gpu-utilization": 0.5}},
            4: {"metrics": {"accuracy": 0.5}},
        }.items():
            commit(store, run, 37 + client + (4 if client == 4 else 0), {client: "ok"}, **columns)
    with (
        Dashboard(folder, DashboardOptions(port=0), catalogue=list) as served,
        httpx.Client(base_url=f"{served.url}api/v1/") as api,
    ):
        yield api


def test_attention_names_each_trouble(troubled: httpx.Client) -> None:
    found = get(troubled, "runs/troubled/attention")
    kinds = {(item["client"], item["kind"]) for item in found["items"]}
    assert kinds == {
        ("0", "silent"), ("1", "failing"), ("2", "missing"), ("3", "never-seen"), ("7", "never-seen"),
        ("5", "overweight"), ("5", "slow"), ("6", "large-update"),
    }  # fmt: skip
    severities = [item["severity"] for item in found["items"]]
    assert severities == sorted(severities, reverse=True)
    words = {item["kind"]: item["message"] for item in found["items"]}
    assert words["failing"].startswith("client 1: failed or was refused in 20 of 40 rounds")
    assert words["missing"].startswith("client 2: missing at the deadline in 36 of 40 rounds")
    assert len(get(troubled, "runs/troubled/attention", limit=2)["items"]) == 2


def test_fairness_is_of_what_clients_report(troubled: httpx.Client) -> None:
    found = get(troubled, "runs/troubled/fairness")
    assert (found["metric"], found["higher_is_better"]) == ("accuracy", True)
    assert (found["clients"], found["without"]) == (3, 5)
    assert found["mean"] == 0.5
    assert found["quantiles"]["min"] == 0.25
    assert found["quantiles"]["p50"] == 0.5
    assert found["worst_tenth"] == 0.25
    assert [point["client"] for point in found["worst"]] == ["5", "4", "6"]
    assert sum(bin_["count"] for bin_ in found["histogram"]) == 3
    assert "gpu-utilization" in found["available"]
    assert "client-id" not in found["available"]
    loss = get(troubled, "runs/troubled/fairness", metric="train-loss")
    assert not loss["higher_is_better"]
    assert loss["gini"] == pytest.approx(0)
    share = get(troubled, "runs/troubled/fairness", metric="participation")
    assert (share["clients"], share["correlation"]) == (8, pytest.approx(1))


def test_gini() -> None:
    assert gini(np.array([1.0, 1.0, 1.0])) == pytest.approx(0)
    assert gini(np.array([0.0, 0.0, 0.0, 1.0])) == pytest.approx(0.75)
    assert np.isnan(gini(np.array([-1.0, 1.0])))
    assert np.isnan(gini(np.array([])))


def test_a_run_without_rounds(tmp_path: Path) -> None:
    with RunStore(tmp_path) as store:
        run = written_run(store, "empty", num_clients=3)
    with (
        Dashboard(tmp_path, DashboardOptions(port=0), catalogue=list) as served,
        httpx.Client(base_url=f"{served.url}api/v1/") as api,
    ):
        assert get(api, f"runs/{run}")["headline"] is None
        assert get(api, f"runs/{run}/clients")["items"][0]["participation"] is None
        assert get(api, f"runs/{run}/fairness")["mean"] is None
        assert get(api, f"runs/{run}/attention")["items"] == []
        assert get(api, f"runs/{run}/rounds")["items"] == []
        assert get(api, "compare", run=run)["x"] == []
        assert api.get(f"runs/{run}/participation").content == b""
