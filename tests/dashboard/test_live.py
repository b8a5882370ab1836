"""The live stream: while another process writes, after a reconnection, at the end, for slow readers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tomli_w
from dashboard_runs import (
    Command,
    Event,
    commit,
    experiment,
    follow,
    lines_of,
    sse_events,
    written_run,
)

from turnout.dashboard import Dashboard, DashboardOptions
from turnout.dashboard.live import Cursor
from turnout.server import RunStore


@pytest.fixture
def own(own_store: Path) -> Iterator[tuple[RunStore, Dashboard]]:
    """A store that a test writes, and a dashboard that shows it."""
    with (
        RunStore(own_store) as store,
        Dashboard(own_store, DashboardOptions(port=0), catalogue=list) as served,
    ):
        yield store, served


def rounds_of(events: list[Event]) -> list[int]:
    return [
        item["round"] for event in events if event.event == "update"
        for part in event.data["rounds"] for item in part["items"]
    ]  # fmt: skip


def until(events: Iterator[Event], condition: str, most: int = 400) -> list[Event]:
    """Read until a run's status is ``condition``."""
    found = []
    for event in events:
        found.append(event)
        if any(run["status"] == condition for run in event.data.get("runs", []) if isinstance(run, dict)):
            return found
        assert len(found) < most
    raise AssertionError(f"the stream ended after {found[-1]}")


def test_a_run_of_another_process_is_followed_without_gaps(own_store: Path, tmp_path: Path) -> None:
    document = experiment(own_store, rounds=150)
    document["client"] = document["client"] | {"local_steps": 20}
    (tmp_path / "live.toml").write_text(tomli_w.dumps(document))
    with Dashboard(own_store, DashboardOptions(port=0), catalogue=list) as served:
        everything = follow(f"{served.url}api/v1/stream")
        assert next(everything).event == "hello"
        simulation = Command(tmp_path, "simulate", "live.toml", "--no-plots", "--json")
        run = ""
        for event in everything:  # The list learns of the new run by itself.
            live = [each["id"] for each in event.data.get("runs", []) if each["status"] == "running"]
            if event.event == "update" and live:
                run = live[0]
                break
        everything.close()
        stream = f"{served.url}api/v1/stream"
        began, found = time.monotonic(), []
        for event in follow(stream, [("run", run), ("after", "0.0")]):
            found.append(event)
            if len(found) == 4:  # Now the browser loses its connection.
                break
        assert rounds_of(found)[0] == 1
        last = found[-1].id
        assert last is not None
        found += until(follow(stream, [("run", run)], headers={"Last-Event-ID": last}), "finished")
        seconds = time.monotonic() - began
        simulation.end()
        with RunStore(own_store) as store:
            measured = dict(store.series(run, "evaluate", "accuracy"))
    assert rounds_of(found) == list(range(1, 151))
    assert [event.data["events"][0]["kind"] for event in found if event.data.get("events")] == [
        "created", "finished"
    ]  # fmt: skip
    streamed = {
        item["round"]: item["metrics"]["evaluate"]["accuracy"] for event in found
        if event.event == "update" for part in event.data["rounds"] for item in part["items"]
        if item["metrics"]["evaluate"]
    }  # fmt: skip
    assert streamed == {number: value for number, value in measured.items() if number}
    assert len(found) <= 5 * seconds + 6  # Five a second, the greetings of two streams, some luck.
    assert {event.retry for event in found} == {2_000}
    assert all(Cursor.parse(event.id or "", 1) for event in found)


def test_a_stream_catches_up_in_pieces(own: tuple[RunStore, Dashboard]) -> None:
    store, served = own
    run = written_run(store, "pieces", status="running")
    for number in range(1, 251):
        commit(store, run, number, {0: "ok"})
    events = []
    for event in follow(f"{served.url}api/v1/stream", [("run", run), ("after", "0.0")]):
        events.append(event)
        if rounds_of(events)[-1:] == [250]:
            break
    assert rounds_of(events) == list(range(1, 251))
    sizes = [len(part["items"]) for event in events[1:] for part in event.data["rounds"]]
    assert sizes == [100, 100, 50]
    assert [part["more"] for event in events[1:] for part in event.data["rounds"]] == [True, True, False]


def test_who_is_far_behind_is_told_to_load_again(own: tuple[RunStore, Dashboard]) -> None:
    store, served = own
    run = written_run(store, "far", status="running")
    commit(store, run, 1, {0: "ok"})
    commit(store, run, 5_000, {0: "ok"})
    stream = follow(f"{served.url}api/v1/stream", [("run", run), ("after", "0.1")])
    assert next(stream).event == "hello"
    event = next(stream)
    assert (event.event, event.data) == ("resync", {"runs": [run], "reason": "behind"})
    assert event.id is not None
    assert event.id.endswith(".5000")
    commit(store, run, 5_001, {0: "ok"})
    found: list[int] = []
    while not found:
        found = rounds_of([next(stream)])
    assert found == [5_001]


def test_a_rewound_run(own: tuple[RunStore, Dashboard]) -> None:
    store, served = own
    run = written_run(store, "rewound", status="running")
    for number in range(1, 6):
        commit(store, run, number, {0: "ok"})
    stream = follow(f"{served.url}api/v1/stream", [("run", run)])
    assert next(stream).id is not None
    next(stream)
    store.reopen(run, after_round=2, num_rounds=9, config={})
    commit(store, run, 3, {1: "ok"})
    events = [next(stream)]
    while not rounds_of(events):
        events.append(next(stream))
    told = [event.data for event in events if event.event == "resync"]
    assert told == [{"runs": [run], "reason": "rewound"}]
    assert rounds_of(events) == [3]


@pytest.mark.parametrize("after", ["x", "1", "999999.1", "1.2.3", "1.1\n2", "-1.0", "1e3.4"])
def test_unknown_cursors_are_told_so(own: tuple[RunStore, Dashboard], after: str) -> None:
    store, served = own
    run = store.runs()[0].id
    stream = follow(f"{served.url}api/v1/stream", [("run", run), ("after", after)])
    assert [next(stream).event, next(stream).event] == ["hello", "resync"]


def test_several_runs_on_one_stream(own: tuple[RunStore, Dashboard]) -> None:
    store, served = own
    runs = [written_run(store, name, status="running") for name in ("one", "two")]
    stream = follow(f"{served.url}api/v1/stream", [("run", run) for run in runs])
    assert next(stream).data["runs"] == runs
    next(stream)
    commit(store, "two", 1, {0: "ok"})
    events = [next(stream)]
    while not rounds_of(events):
        events.append(next(stream))
    assert [part["run"] for part in events[-1].data["rounds"]] == ["two"]
    assert events[-1].id is not None
    assert events[-1].id.endswith(".0.1")


def test_unknown_runs_and_too_many(own: tuple[RunStore, Dashboard]) -> None:
    _, served = own
    assert httpx.get(f"{served.url}api/v1/stream", params={"run": "nothing"}).status_code == 404
    nine = [("run", f"r{number}") for number in range(9)]
    assert httpx.get(f"{served.url}api/v1/stream", params=nine).status_code == 422


def test_the_end_says_goodbye_in_time(own_store: Path) -> None:
    with Dashboard(own_store, DashboardOptions(port=0), catalogue=list) as served:
        streams = [follow(f"{served.url}api/v1/stream") for _ in range(3)]
        assert [next(stream).event for stream in streams] == ["hello"] * 3
        stopping = threading.Thread(target=served.__exit__, args=(None, None, None))
        began = time.monotonic()
        stopping.start()
        ends = [list(stream)[-1] for stream in streams]
        stopping.join()
        assert time.monotonic() - began < 5
    assert [(end.event, end.data) for end in ends] == [("bye", {"reason": "shutdown"})] * 3


def test_a_slow_reader_gets_the_newest_state(own: tuple[RunStore, Dashboard]) -> None:
    """One that does not read costs nothing; when it reads again nothing is missing or doubled."""
    store, served = own
    run = written_run(store, "slow", status="running")
    long = {f"metric-{number:03d}-{'x' * 50}": 0.5 for number in range(300)}
    with httpx.stream("GET", f"{served.url}api/v1/stream", params={"run": run}, timeout=30) as response:
        for number in range(1, 401):
            commit(store, run, number, {0: "ok"}, measured=long)
        began = time.monotonic()
        assert httpx.get(f"{served.url}api/v1/runs").status_code == 200
        assert time.monotonic() - began < 5
        events = []

        for event in sse_events(lines_of(response)):
            events.append(event)
            if rounds_of(events)[-1:] == [400]:
                break
    assert rounds_of(events) == list(range(1, 401))


def test_streams_are_counted_and_bounded(own: tuple[RunStore, Dashboard]) -> None:
    _, served = own

    def subscribers() -> float:
        text = httpx.get(f"{served.url}metrics").text
        (line,) = [line for line in text.splitlines() if line.startswith("turnout_dashboard_subscribers ")]
        return float(line.split()[1])

    stream = follow(f"{served.url}api/v1/stream")
    next(stream)
    assert subscribers() == 1
    stream.close()
    deadline = time.monotonic() + 10
    while subscribers():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    served.app.state.services.live._subscribers = 100
    answer = httpx.get(f"{served.url}api/v1/stream")
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too-many")
    served.app.state.services.live._subscribers = 0
