"""The fleet as a party of the throughput benchmark (see `fleet_parties`): real server, real nodes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fleet_bare import Certificates
from fleet_parties import Turns, children, memory_mb, reset_peak
from turnout.client.node import ClientTls, run_node
from turnout.server.fleet import CommitCallback, FleetGrid, FleetServer
from turnout.strategies import Callback, FedAvg, RoundReport
from turnout.wire import as_array, view
from turnout.wire.flower import records_of

WAIT_SECONDS = 600.0


def model(nbytes: int) -> ArrayRecord:
    """Return one float32 tensor of ``nbytes``."""
    arrays = ArrayRecord()
    arrays["w"] = as_array(np.zeros(nbytes // 4, np.float32))
    return arrays


def moving_app() -> ClientApp:
    """Train: the model plus noise that each client draws once. Query: when the request was there, in full."""
    app = ClientApp()
    noise: list[Any] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        received = view(records_of(message.content, ArrayRecord)["arrays"]["w"])
        if not noise:
            generator = np.random.default_rng(context.node_id)
            noise.append(generator.standard_normal(received.size, np.float32) * np.float32(1e-3))
        arrays = ArrayRecord()
        arrays["w"] = as_array(received + noise[0])
        metrics = MetricRecord({"num-examples": 1, "client-id": context.node_id})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        # The monotonic clock is one for all processes of a machine.
        metrics = MetricRecord({"arrived": time.perf_counter()})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def node(address: str, client: int, tls: ClientTls | None) -> None:
    run_node(address, moving_app(), [client], name=f"n{client}", tls=tls)


def nodes(server: FleetServer, clients: int, certificates: Certificates | None) -> Any:
    """Return the context of ``clients`` node processes."""
    calls = []
    for client in range(clients):
        tls = None if certificates is None else certificates.client(f"n{client}")
        calls.append((node, (server.address, client, tls)))
    return children(calls)


class Uploads:
    """Holds finished replies back until all clients have one, so that all uploads are granted at once."""

    def __init__(self, server: FleetServer, clients: int) -> None:
        self._enqueue = server.hub.slots.enqueue
        self._clients = clients
        self._held: list[Any] = []
        self.began = self.cpu = 0.0
        server.hub.slots.enqueue = self._hold  # type: ignore[method-assign]

    def _hold(self, task: Any) -> None:
        self._held.append(task)
        if len(self._held) == self._clients:
            held, self._held = self._held, []
            self.began, self.cpu = time.perf_counter(), time.process_time()
            for task in held:
                self._enqueue(task)


class MeasuredGrid(FleetGrid):
    """Notes when the strategy has folded the last reply: that is when it asks for one more."""

    folded = cpu = 0.0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._noting(super().send_and_receive(messages, timeout=timeout))

    def _noting(self, replies: Iterable[Message]) -> Iterator[Message]:
        for reply in replies:
            yield reply
            del reply
            self.folded, self.cpu = time.perf_counter(), time.process_time()


class _Gate(Callback):
    """Lets each round wait for its turn, and answers with its figures."""

    def __init__(self, turns: Turns, grid: MeasuredGrid, uploads: Uploads) -> None:
        self._turns, self._grid, self._uploads = turns, grid, uploads

    def on_start(self, strategy: Any, *, num_rounds: int, first_round: int) -> None:
        self._next()

    def on_round_end(self, report: RoundReport) -> None:
        bad = [row for row in report.clients if row.outcome != "ok"]
        if bad:
            raise RuntimeError(f"round {report.server_round}: {bad}")
        self._turns.answer(
            seconds=self._grid.folded - self._uploads.began, cpu=self._grid.cpu - self._uploads.cpu
        )
        self._next()

    def _next(self) -> None:
        if not self._turns.wait():
            raise KeyboardInterrupt


def fleet_upload(turns: Turns, clients: int, nbytes: int, certificates: Certificates | None = None) -> None:
    """Uploads with checks and fold: from the grants, all at once, until the last reply is folded."""
    tls = None if certificates is None else certificates.server()
    with FleetServer(num_clients=clients, tls=tls) as server, nodes(server, clients, certificates):
        uploads = Uploads(server, clients)
        grid = MeasuredGrid(server, min_clients=clients, wait=WAIT_SECONDS)
        grid.get_node_ids()
        turns.ready()
        try:
            FedAvg(num_clients=clients).start(
                grid,
                model(nbytes),
                num_rounds=1_000_000,
                timeout=WAIT_SECONDS,
                callbacks=[CommitCallback(grid), _Gate(turns, grid, uploads)],
            )
        finally:
            server.stop(grace=1)


def fleet_broadcast(turns: Turns, clients: int, nbytes: int) -> None:
    """A model to all clients: from the first offer until the last client has it, decoded and checked.

    ``encoded_seconds`` counts from the call instead, which cuts the model into frames, once for all.
    """
    with FleetServer(num_clients=clients) as server, nodes(server, clients, None):
        grid = FleetGrid(server, min_clients=clients, wait=WAIT_SECONDS)
        opened = [0.0, 0.0, 0.0]
        open_exchange = server.hub.open

        def note(exchange: Any) -> None:
            opened[:] = time.perf_counter(), time.process_time(), memory_mb()
            reset_peak()
            open_exchange(exchange)

        server.hub.open = note  # type: ignore[method-assign]
        grid.start_round(1)
        arrays = model(nbytes)
        turns.ready()
        while turns.wait():
            called = time.perf_counter()
            content = RecordDict({"arrays": arrays})
            requests = [grid.create_message(content, "query", i, "1") for i in grid.get_node_ids()]
            replies = list(grid.send_and_receive(requests, timeout=WAIT_SECONDS))
            arrived = max(records_of(r.content, MetricRecord)["metrics"]["arrived"] for r in replies)
            assert isinstance(arrived, float)
            turns.answer(
                seconds=arrived - opened[0],
                encoded_seconds=arrived - called,
                cpu=time.process_time() - opened[1],
                growth_mb=memory_mb("VmHWM") - opened[2],
            )
        server.stop(grace=1)
