"""The server's peak memory against the number of replies that wait for it at the same moment.

    python benchmarks/fleet_memory.py [--cohorts 4 32 64 256] [--megabytes 40] [--quick]

Prints one JSON line: per cohort the peak of the server's resident memory (VmHWM of a process of its own, over
three rounds, and by phase), beside the stated bound. All replies are ready when the round has hardly begun.
Each client is a node with a connection of its own, up to 64; beyond that nodes host several logical clients.
The nodes live in two processes and the clients of a process reply the same arrays, so that they fit the
machine as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import tracemalloc
from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fleet_parties import Party, Turns, children, memory_mb, reset_peak, rounded
from fleet_turnout import WAIT_SECONDS, model
from turnout.client.node import Node, NodeOptions
from turnout.server.fleet import CommitCallback, FleetGrid, FleetOptions, FleetServer
from turnout.strategies import FedAvg, RoundReport
from turnout.wire import as_array, view
from turnout.wire.flower import records_of

MB = 1_000_000
ROUNDS = 3
MOST_NODES = 64
PROCESSES = 2
STREAM_MB = 0.04
RECEIVE_MB = 15.0
# What FedAvg and its run hold, in models of float32: the initial one, the current and the next one, the
# reply's difference to what was sent (1 each), the exact sum and the mean made of it (float64, 2 each). The
# broadcast's frames (1) are let go before the mean is made.
ACCUMULATORS = 8


def echo_once() -> ClientApp:
    """Every client of the process replies the same arrays: the model of round 1 plus one."""
    app = ClientApp()
    made: list[ArrayRecord] = []
    making = threading.Lock()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        with making:
            if not made:
                record = ArrayRecord()
                for name, array in records_of(message.content, ArrayRecord)["arrays"].items():
                    record[name] = as_array(view(array) + view(array).dtype.type(1))
                made.append(record)
        metrics = MetricRecord({"num-examples": 1, "client-id": context.node_id})
        return Message(RecordDict({"arrays": made[0], "metrics": metrics}), reply_to=message)

    return app


def nodes(address: str, parts: list[list[int]]) -> None:
    """Run one node for each part, which is a list of logical clients."""
    app = echo_once()

    async def main() -> None:
        options = [NodeOptions(name=f"n{part[0]}", clients=part) for part in parts]
        await asyncio.gather(*(Node(address, app, option).run() for option in options))

    asyncio.run(main())


class PhasedGrid(FleetGrid):
    """Notes the peak memory of each phase: until the first reply is handed over, then of the others."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.peaks = {"broadcast_mb": 0.0, "uploads_mb": 0.0, "finish_mb": 0.0}

    def note(self, phase: str) -> None:
        """End a phase."""
        self.peaks[phase] = max(self.peaks[phase], memory_mb("VmHWM"))
        reset_peak()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        reset_peak()
        return self._noting(super().send_and_receive(messages, timeout=timeout))

    def _noting(self, replies: Iterable[Message]) -> Iterator[Message]:
        phase = "broadcast_mb"
        for reply in replies:
            self.note(phase)
            phase = "uploads_mb"
            yield reply
            del reply
        self.note(phase)


class _End(CommitCallback):
    def __init__(self, grid: PhasedGrid) -> None:
        super().__init__(grid)
        self._phases = grid

    def on_round_end(self, report: RoundReport) -> None:
        self._phases.note("finish_mb")
        bad = [row for row in report.clients if row.outcome != "ok"]
        if bad:
            raise RuntimeError(f"{len(bad)} replies failed, the first: {bad[0]}")
        super().on_round_end(report)


def server(turns: Turns, clients: int, nbytes: int, slots: int, trace: bool) -> None:
    """One run; the answer is the peaks, and what the process used before the first client came."""
    streams = min(clients, MOST_NODES)
    parts = [list(range(i, clients, streams)) for i in range(streams)]
    with FleetServer(num_clients=clients, options=FleetOptions(upload_slots=slots)) as fleet:
        strategy = FedAvg(num_clients=clients)
        grid = PhasedGrid(fleet, min_clients=clients, wait=WAIT_SECONDS)
        turns.ready()
        turns.wait()
        idle = memory_mb()
        if trace:
            tracemalloc.start(8)
        with children([(nodes, (fleet.address, parts[i::PROCESSES])) for i in range(PROCESSES)]):
            strategy.start(
                grid, model(nbytes), num_rounds=ROUNDS, timeout=WAIT_SECONDS, callbacks=[_End(grid)]
            )
            if trace:
                _show_trace()
            fleet.stop(grace=1)
    turns.answer(idle_mb=idle, peak_mb=max(grid.peaks.values()), **grid.peaks, streams=float(streams))


def _show_trace() -> None:
    size, peak = tracemalloc.get_traced_memory()
    print(f"traced now {size / 1e6:.1f} MB, at most {peak / 1e6:.1f} MB; largest now:", file=sys.stderr)
    for line in tracemalloc.take_snapshot().statistics("traceback")[:8]:
        print(
            f"{line.size / 1e6:.1f} MB in {line.count}:", *line.traceback.format(), sep="\n", file=sys.stderr
        )


def measure(clients: int, nbytes: int, slots: int, trace: bool) -> dict[str, Any]:
    """Return one cohort's row."""
    with Party(server, clients, nbytes, slots, trace, name=f"server-{clients}") as party:
        sample = party.ready().round(1800)
    size = nbytes / MB
    bound = (ACCUMULATORS + slots) * size + slots * RECEIVE_MB + STREAM_MB * sample["streams"]
    bound += sample["idle_mb"]
    row: dict[str, Any] = {
        "clients": clients,
        **sample,
        "bound_mb": bound,
        "ratio": sample["peak_mb"] / bound,
    }
    row |= {"target": "<= 1.15"}
    print(rounded(row), file=sys.stderr)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cohorts", type=int, nargs="+", default=[4, 32, 64, 256])
    parser.add_argument("--megabytes", type=int, default=40, help="size of one reply (default 40)")
    parser.add_argument("--slots", type=int, default=4, help="upload slots (default 4)")
    parser.add_argument(
        "--trace", action="store_true", help="also print what Python's objects hold, to stderr"
    )
    parser.add_argument("--quick", action="store_true", help="cohorts 4 and 16 of 4 MB")
    options = parser.parse_args()
    if options.quick:
        options.cohorts, options.megabytes = [4, 16], 4
    size = options.megabytes * MB
    rows = [measure(clients, size, options.slots, options.trace) for clients in options.cohorts]
    peaks = {row["clients"]: row["peak_mb"] for row in rows}
    first, at = min(peaks), 64 if 64 in peaks else max(peaks)
    result = {
        "benchmark": "fleet-memory",
        "megabytes": options.megabytes,
        "upload_slots": options.slots,
        "bound": f"({ACCUMULATORS} + slots) x model + slots x {RECEIVE_MB:g} MB + streams x 40 kB + idle",
        "rows": [rounded(row) for row in rows],
        "compared": [at, first],
        "growth_ratio": peaks[at] / peaks[first],
        "growth_target": "<= 1.1",
    }
    print(json.dumps(rounded(result)))


if __name__ == "__main__":
    main()
