from __future__ import annotations

import gc
import math
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from turnout.simulation import LocalGrid
from turnout.wire import as_array
from turnout.wire.flower import reply

Ask = Callable[..., list[Message]]
MakeApp = Callable[..., ClientApp]
EXECUTORS = [("serial", None), ("threads", 1), ("threads", 3), ("processes", 2)]


def nodes_of(replies: Any) -> list[int]:
    return [r.metadata.src_node_id for r in replies]


# Laziness and order.


@pytest.mark.parametrize(
    ("executor", "workers", "bound"), [("serial", None, 1), ("threads", 2, 4), ("threads", 3, 6)]
)
@pytest.mark.parametrize("explicit_rounds", [False, True])
def test_few_replies_are_alive_at_a_time(
    executor: str, workers: int | None, bound: int, explicit_rounds: bool, ask: Ask
) -> None:
    alive: weakref.WeakSet[Message] = weakref.WeakSet()
    peak, started = 0, 0
    lock = threading.Lock()
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        nonlocal peak, started
        answer = reply(RecordDict({"arrays": ArrayRecord({"x": as_array(np.zeros(1000))})}), to=message)
        with lock:
            started += 1
            alive.add(answer)
            peak = max(peak, len(alive))
        return answer

    grid = LocalGrid(app, 60, executor=executor, workers=workers)
    if explicit_rounds:
        grid.start_round(1)
    replies = iter(grid.send_and_receive(ask(range(60))))
    assert started == 0
    next(replies)
    time.sleep(0.05)
    assert started <= 1 + 2 * (workers or 0)
    count = 1
    while next(replies, None) is not None:  # Holds no reply itself, unlike a for loop.
        count += 1
    assert count == 60
    assert peak <= bound
    gc.collect()
    assert len(alive) == 0


def test_threads_yield_as_clients_complete_under_explicit_rounds(make_app: MakeApp, ask: Ask) -> None:
    others_done = threading.Event()

    def wait(client: int, message: Message) -> None:
        if client == 0:
            others_done.wait(5)

    grid = LocalGrid(make_app(wait), 4, executor="threads", workers=2)
    grid.start_round(1)
    order = []
    for answer in grid.send_and_receive(ask(range(4))):
        order.append(answer.metadata.src_node_id)
        if len(order) == 3:
            others_done.set()
    assert order[-1] == 0
    assert sorted(order) == [0, 1, 2, 3]


def test_threads_keep_the_order_of_messages_otherwise(make_app: MakeApp, ask: Ask) -> None:
    grid = LocalGrid(
        make_app(lambda client, message: time.sleep(0.02 * (client % 3 == 0))),
        9,
        executor="threads",
        workers=3,
    )
    assert nodes_of(grid.send_and_receive(ask(range(9)))) == list(range(9))


def test_threads_run_at_most_workers_clients_and_use_them_all(make_app: MakeApp, ask: Ask) -> None:
    now, most = 0, 0
    lock = threading.Lock()

    def busy(client: int, message: Message) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1

    grid = LocalGrid(make_app(busy), 12, executor="threads", workers=3)
    assert len(list(grid.send_and_receive(ask(range(12))))) == 12
    assert most == 3


def test_a_client_asked_twice_is_run_once_at_a_time_in_order(ask: Ask) -> None:
    running, rounds = 0, []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        nonlocal running
        running += 1
        assert running == 1
        time.sleep(0.005)
        rounds.append(message.content["config"]["server-round"])
        running -= 1
        return reply(RecordDict(), to=message)

    grid = LocalGrid(app, 1, executor="threads", workers=4)
    messages = [ask([0], None, r)[0] for r in range(6)]
    assert not any(r.has_error() for r in grid.send_and_receive(messages))
    assert rounds == list(range(6))


def test_closing_the_generator_starts_no_more_clients(make_app: MakeApp, ask: Ask) -> None:
    for executor, workers in EXECUTORS:
        ran: list[int] = []
        grid = LocalGrid(
            make_app(lambda client, message: ran.append(client)),
            50,
            executor=executor,
            workers=workers,
        )
        replies = grid.send_and_receive(ask(range(50)))
        next(iter(replies))
        replies.close()  # type: ignore[attr-defined]
        grid.state_dict()
        assert len(ran) <= 1 + 2 * (workers or 0)
        assert len(list(grid.send_and_receive(ask(grid.get_node_ids())))) == 50


def test_buffered_replies_can_be_read_twice(make_app: MakeApp, ask: Ask) -> None:
    replies = LocalGrid(make_app(), 3, buffer_replies=True).send_and_receive(ask(range(3)))
    assert nodes_of(replies) == nodes_of(replies) == [0, 1, 2]


# Deadlines.


@pytest.mark.parametrize("explicit_rounds", [False, True])
def test_late_replies_of_threads_are_dropped_and_counted(
    explicit_rounds: bool, make_app: MakeApp, ask: Ask
) -> None:
    release = threading.Event()
    grid = LocalGrid(
        make_app(lambda client, message: client == 0 and release.wait(10)), 5, executor="threads", workers=2
    )
    if explicit_rounds:
        grid.start_round(1)
    began = time.monotonic()
    replies = list(grid.send_and_receive(ask(range(5)), timeout=0.3))
    assert time.monotonic() - began < 2
    # Client 0 blocks the head of the window of 4; in the order of messages the fifth is never started.
    assert sorted(nodes_of(replies)) == ([1, 2, 3, 4] if explicit_rounds else [1, 2, 3])
    assert grid.tally.late == 5 - len(replies)
    release.set()
    grid.start_round(2)
    replies = list(grid.send_and_receive(ask(range(5), None, 2), timeout=10))
    assert sorted(nodes_of(replies)) == [0, 1, 2, 3, 4]
    assert all(r.metadata.group_id == "2" for r in replies)
    clients = grid.state_dict()["clients"]
    assert clients["0"][1] == ["calls", "metrics", [["count", 2]]]  # It had trained, only too late.


def test_a_reply_completed_after_the_deadline_is_late_even_if_asked_for_later_still(
    make_app: MakeApp, ask: Ask
) -> None:
    grid = LocalGrid(
        make_app(lambda client, message: time.sleep(0.4 * client)), 2, executor="threads", workers=2
    )
    replies = iter(grid.send_and_receive(ask(range(2)), timeout=0.2))
    assert next(replies).metadata.src_node_id == 0
    time.sleep(0.5)
    assert list(replies) == []
    assert grid.tally.late == 1


def test_after_the_deadline_no_client_starts_and_a_checkpoint_waits_for_the_running(
    make_app: MakeApp, ask: Ask
) -> None:
    started: list[int] = []

    def slow(client: int, message: Message) -> None:
        started.append(client)
        time.sleep(0.3)

    grid = LocalGrid(make_app(slow), 3, executor="threads", workers=1)
    assert list(grid.send_and_receive(ask(range(3)), timeout=0.1)) == []
    assert list(grid.state_dict()["clients"]) == ["0"]
    time.sleep(0.05)
    assert started == [0]


def test_serial_stops_at_the_deadline(make_app: MakeApp, ask: Ask) -> None:
    grid = LocalGrid(make_app(lambda client, message: time.sleep(0.2 * (client == 2))), 5)
    assert nodes_of(grid.send_and_receive(ask(range(5)), timeout=0.1)) == [0, 1]
    assert grid.tally.late == 3
    assert nodes_of(grid.send_and_receive(ask([0, 1]), timeout=math.inf)) == [0, 1]


def test_a_client_that_never_returns_does_not_keep_the_process() -> None:
    code = """
import threading
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from turnout.simulation import LocalGrid
app = ClientApp()
@app.train()
def train(message, context):
    threading.Event().wait()
grid = LocalGrid(app, 2, executor="threads", workers=1)
message = Message(RecordDict(), 0, "train")  # As stock strategies make them.
print(list(grid.send_and_receive([message], timeout=0.1)), grid.tally.late)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[] 1"


def test_threads_end_with_the_grid(make_app: MakeApp, ask: Ask) -> None:
    before = threading.active_count()
    grid = LocalGrid(make_app(), 4, executor="threads", workers=4)
    list(grid.send_and_receive(ask(range(4))))
    assert threading.active_count() == before + 4
    del grid
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
