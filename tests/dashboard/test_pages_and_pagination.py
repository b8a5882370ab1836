"""Pages of lists have every item once; the page's files are served as they should be."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from dashboard_runs import commit, written_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turnout.dashboard import Dashboard, DashboardOptions
from turnout.dashboard.downsampling import downsampled
from turnout.dashboard.queries.series import Points
from turnout.server import RunStore

RUNS, ROUNDS, CLIENTS = 37, 53, 23
few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("many")
    with RunStore(folder) as store:
        for number in range(RUNS):
            written_run(store, f"r{number}", name=f"name-{number % 3}", seconds=float(number % 4))
        for number in range(1, ROUNDS + 1):
            commit(
                store, "r0", number, {client: "ok" for client in range(CLIENTS) if number % (client + 1) == 0}
            )
        store.finish("r0", "finished", seconds=1.0)
    with (
        Dashboard(folder, DashboardOptions(port=0), catalogue=list) as served,
        httpx.Client(base_url=f"{served.url}api/v1/") as api,
    ):
        yield api


def by_offset(api: httpx.Client, path: str, limit: int, **params: Any) -> list[Any]:
    items: list[Any] = []
    while True:
        page = api.get(path, params={"limit": limit, "offset": len(items)} | params).json()
        assert len(page["items"]) <= limit
        if not page["items"]:
            assert len(items) == page["total"]
            return items
        items += page["items"]


def by_cursor(api: httpx.Client, path: str, limit: int, **params: Any) -> list[Any]:
    items: list[Any] = []
    cursor: dict[str, Any] = {}
    while True:
        page = api.get(path, params={"limit": limit} | cursor | params).json()
        assert len(page["items"]) <= limit
        items += page["items"]
        if page["next"] is None or page.get("more") is False:
            return items
        cursor = {"after": page["next"]}


@few
@given(
    limit=st.integers(1, 50),
    sort=st.sampled_from(["created", "name", "strategy", "task", "status", "rounds", "seconds", "metric"]),
    order=st.sampled_from(["asc", "desc"]),
)
def test_pages_of_runs(many: httpx.Client, limit: int, sort: str, order: str) -> None:
    items = by_offset(many, "runs", limit, sort=sort, order=order)
    assert sorted(item["id"] for item in items) == sorted(f"r{number}" for number in range(RUNS))
    if sort in ("name", "seconds"):
        values = [item[sort] for item in items]
        assert values == sorted(values, reverse=order == "desc")


@few
@given(
    limit=st.integers(1, 40),
    sort=st.sampled_from(["client", "participation", "staleness", "weight-share", "train-loss", "accuracy"]),
    order=st.sampled_from(["asc", "desc"]),
)
def test_pages_of_clients(many: httpx.Client, limit: int, sort: str, order: str) -> None:
    items = by_offset(many, "runs/r0/clients", limit, sort=sort, order=order)
    assert sorted(int(item["client"]) for item in items if item["seen"]) == list(range(CLIENTS))


@few
@given(limit=st.integers(1, 70), order=st.sampled_from(["asc", "desc"]), client=st.integers(0, CLIENTS - 1))
def test_pages_by_cursor(many: httpx.Client, limit: int, order: str, client: int) -> None:
    rounds = [item["round"] for item in by_cursor(many, "runs/r0/rounds", limit, order=order)]
    assert rounds == sorted(range(1, ROUNDS + 1), reverse=order == "desc")
    path = f"runs/r0/clients/{client}/rounds"
    mine = [item["round"] for item in by_cursor(many, path, limit, order=order)]
    assert mine == sorted(range(client + 1, ROUNDS + 1, client + 1), reverse=order == "desc")
    events = [item["id"] for item in by_cursor(many, "events", limit)]
    assert events == sorted(set(events))
    assert len(events) == RUNS + 1


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(allow_infinity=False, width=32), min_size=1, max_size=300),
    most=st.integers(4, 120),
)
def test_thinning_keeps_ends_and_extremes(values: list[float], most: int) -> None:
    whole = Points(np.arange(len(values)) * 2, np.array(values))
    thin = downsampled(whole, most)
    assert len(thin.rounds) <= most
    assert (np.diff(thin.rounds) > 0).all()
    assert (thin.rounds[0], thin.rounds[-1]) == (whole.rounds[0], whole.rounds[-1])
    assert np.array_equal(thin.values, whole.values[thin.rounds // 2], equal_nan=True)
    known = whole.values[~np.isnan(whole.values)]
    if len(known):
        assert np.nanmin(thin.values) == known.min()
        assert np.nanmax(thin.values) == known.max()
    if len(values) <= most:
        assert len(thin.rounds) == len(values)


@pytest.fixture
def built(tmp_path: Path, recorded: Path) -> Iterator[Callable[..., httpx.Response]]:
    """A dashboard with a built page: index, hashed assets, a compressed copy; a secret beside the folder."""
    folder = tmp_path / "static"
    (folder / "assets").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html><title>built</title>")
    (folder / "assets" / "index-Ab12Cd34.js").write_text("console.log('plain')")
    (folder / "assets" / "index-Ab12Cd34.js.gz").write_bytes(gzip.compress(b"console.log('zipped')"))
    (folder / "THIRD_PARTY_LICENSES.txt").write_text("MIT")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    with Dashboard(recorded, DashboardOptions(port=0), catalogue=list, static=folder) as served:

        def get(path: str, **headers: str) -> httpx.Response:
            plain = {"Accept-Encoding": "identity"} | headers
            return httpx.get(f"{served.url.rstrip('/')}{path}", headers=plain)

        yield get


def test_the_page_and_its_views(built: Callable[..., httpx.Response]) -> None:
    for path in (
        "/",
        "/runs",
        "/runs/abc",
        "/runs/abc/clients/3",
        "/compare",
        "/methods",
        "/clients",
        "/?page=run",
    ):
        answer = built(path)
        assert answer.status_code == 200
        assert "built" in answer.text
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["content-type"].startswith("text/html")
    assert built("/elsewhere").status_code == 404


def test_assets_are_kept_for_ever_and_sent_compressed(built: Callable[..., httpx.Response]) -> None:
    path = "/assets/index-Ab12Cd34.js"
    plain = built(path)
    assert plain.text == "console.log('plain')"
    zipped = built(path, **{"Accept-Encoding": "gzip"})
    assert zipped.headers["content-encoding"] == "gzip"
    assert zipped.text == "console.log('zipped')"
    for answer in (plain, zipped):
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert "javascript" in answer.headers["content-type"]
        assert "Accept-Encoding" in answer.headers["vary"]
    again = built(path, **{"If-None-Match": plain.headers["etag"]})
    assert again.status_code == 304
    assert built("/THIRD_PARTY_LICENSES.txt").headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt", "/%2e%2e/secret.txt", "/assets/..%2f..%2fsecret.txt", "/assets/../../secret.txt",
        "/..%5csecret.txt", "//etc/passwd", "/assets/%00", "/link.txt", "/assets",
        "/%2e%2e%2f%2e%2e%2fetc/passwd",
    ],
)  # fmt: skip
def test_paths_stay_in_the_folder(built: Callable[..., httpx.Response], path: str) -> None:
    answer = built(path)
    assert answer.status_code in (404, 307)
    assert "secret" not in answer.text


def test_without_a_built_page_it_says_how_to_build_one(recorded: Path, tmp_path: Path) -> None:
    options = DashboardOptions(port=0)
    with Dashboard(recorded, options, catalogue=list, static=tmp_path / "none") as served:
        page = httpx.get(served.url)
        assert page.status_code == 200
        assert "make page" in page.text
        assert httpx.get(f"{served.url}assets/x.js").status_code == 404
