"""Uploads with checks and fold, and broadcasts, beside sockets and bare gRPC that move the same bytes.

    python benchmarks/fleet_throughput.py [--megabytes 100] [--turns 9] [--quick]

Prints one JSON line: for each figure the fleet's, its limit's and the median of the turns' ratios. GB are 1e9
bytes of model. Every server is a process of its own and so is every client; the parties of a group take
turns. An upload is timed from the moment when all clients may send until the last byte is received, and,
for the fleet, checked and folded. A broadcast is timed until the last client has it; the fleet's clients have
then copied it into a model and checked its checksum, the bare ones have dropped the frames.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fleet_bare import Certificates, grpc_broadcast, grpc_upload, sockets
from fleet_parties import Party, Sample, median_of, paired, rounded, take_turns
from fleet_turnout import fleet_broadcast, fleet_upload

MB = 1_000_000
Call = tuple[str, Callable[..., None], tuple[Any, ...]]


def measure(calls: Sequence[Call], turns: int) -> dict[str, list[Sample]]:
    """Return the samples of parties that take turns, by their names."""
    with contextlib.ExitStack() as stack:
        parties = [stack.enter_context(Party(target, *args, name=name)) for name, target, args in calls]
        for party in parties:
            party.ready()
        samples = take_turns(parties, turns)
    return {party.name: rows for party, rows in zip(parties, samples, strict=True)}


class Table:
    """Rows of one group: a figure beside its limit."""

    def __init__(self, samples: dict[str, list[Sample]], gigabytes: dict[str, float]) -> None:
        self._samples = samples
        self._gigabytes = gigabytes
        self.rows: list[dict[str, Any]] = []

    def rate(self, figure: str, ours: str, limit: str, target: float, ambitious: float | None = None) -> None:
        """Add GB/s of ``ours`` as a share of ``limit``'s, which may move another number of bytes."""
        scale = self._gigabytes[ours] / self._gigabytes[limit]
        self._add(
            figure,
            self._rate(ours),
            limit,
            self._rate(limit),
            scale * paired(self._samples[limit], self._samples[ours]),
            f">= {target:g}",
            ambitious,
        )

    def cost(
        self,
        figure: str,
        ours: str,
        limit: str,
        name: str,
        target: float,
        ambitious: float | None = None,
        limit_name: str = "",
    ) -> None:
        """Add a cost per GB, in seconds, over the limit's."""
        mine, theirs = self._samples[ours], self._samples[limit]
        theirs = [{name: row[limit_name or name]} for row in theirs]
        self._add(
            figure,
            median_of(mine, name) / self._gigabytes[ours],
            limit,
            median_of(theirs, name) / self._gigabytes[limit],
            paired(mine, theirs, name) * self._gigabytes[limit] / self._gigabytes[ours],
            f"<= {target:g}",
            ambitious,
        )

    def _rate(self, party: str) -> float:
        return self._gigabytes[party] / median_of(self._samples[party])

    def _add(
        self, figure: str, ours: float, limit: str, theirs: float, ratio: float, target: str, ambitious: Any
    ) -> None:
        row = {"figure": figure, "ours": ours, "limit": limit, "limit_value": theirs, "ratio": ratio,
               "target": target}  # fmt: skip
        if ambitious is not None:
            row["ambitious"] = ambitious
        self.rows.append(rounded(row))
        print(self.rows[-1], file=sys.stderr)


def uploads(clients: int, size: int, turns: int) -> list[dict[str, Any]]:
    """Plain uploads of ``clients`` clients beside TCP and bare gRPC."""
    calls: list[Call] = [
        ("fleet", fleet_upload, (clients, size)),
        ("bare-grpc", grpc_upload, (clients, size)),
        ("tcp", sockets, (clients, size)),
    ]
    table = Table(measure(calls, turns), dict.fromkeys(("fleet", "bare-grpc", "tcp"), clients * size / 1e9))
    name = f"upload-{clients}"
    if clients == 1:
        table.rate(f"{name}-gb-per-s-of-tcp", "fleet", "tcp", 0.30, 0.35)
    else:
        table.rate(f"{name}-gb-per-s-of-tcp", "fleet", "tcp", 0.25, 0.30)
    table.rate(f"{name}-gb-per-s-of-bare-grpc", "fleet", "bare-grpc", 0.80, 0.90)
    table.cost(f"{name}-server-cpu-s-per-gb", "fleet", "bare-grpc", "cpu", 1.5, 1.3)
    return table.rows


def secure_uploads(clients: int, size: int, turns: int) -> list[dict[str, Any]]:
    """Uploads under mutual TLS beside one ssl socket, bare gRPC under mutual TLS, and plain uploads."""
    total = clients * size / 1e9
    with tempfile.TemporaryDirectory(prefix="fleet-throughput-") as place:
        certificates = Certificates.create(Path(place), clients)
        calls: list[Call] = [
            ("fleet-mtls", fleet_upload, (clients, size, certificates)),
            ("ssl-socket-1-to-1", sockets, (1, size, certificates)),
            ("bare-grpc-mtls", grpc_upload, (clients, size, certificates)),
            ("fleet-plain", fleet_upload, (clients, size)),
        ]
        sizes = {name: total for name, _, _ in calls} | {"ssl-socket-1-to-1": size / 1e9}
        table = Table(measure(calls, turns), sizes)
    name = f"mtls-upload-{clients}"
    table.rate(f"{name}-gb-per-s-of-ssl-socket", "fleet-mtls", "ssl-socket-1-to-1", 0.8, 1.0)
    table.rate(f"{name}-gb-per-s-of-bare-grpc-mtls", "fleet-mtls", "bare-grpc-mtls", 0.8, 0.9)
    table.rate(f"{name}-gb-per-s-of-plain", "fleet-mtls", "fleet-plain", 0.6)
    return table.rows


def broadcasts(clients: int, size: int, turns: int) -> tuple[list[dict[str, Any]], float]:
    """Return the rows of a broadcast and the server's peak growth while it is sent, in MB."""
    calls: list[Call] = [
        ("fleet", fleet_broadcast, (clients, size)),
        ("bare-grpc", grpc_broadcast, (clients, size)),
    ]
    samples = measure(calls, turns)
    table = Table(samples, dict.fromkeys(samples, clients * size / 1e9))
    name = f"broadcast-{clients}"
    table.cost(f"{name}-s-per-gb", "fleet", "bare-grpc", "seconds", 1.15)
    with_encoding = f"{name}-with-encoding-s-per-gb"
    table.cost(with_encoding, "fleet", "bare-grpc", "encoded_seconds", 1.15, limit_name="seconds")
    table.cost(f"{name}-server-cpu-s-per-gb", "fleet", "bare-grpc", "cpu", 1.5)
    return table.rows, median_of(samples["fleet"], "growth_mb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="size of the model (default 100)")
    parser.add_argument("--turns", type=int, default=9, help="turns of every party (default 9)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--only", nargs="+", choices=["upload", "mtls", "broadcast"], default=None)
    parser.add_argument("--quick", action="store_true", help="10 MB, 3 turns: whether it works, not how fast")
    options = parser.parse_args()
    if options.quick:
        options.megabytes, options.turns = min(options.megabytes, 10), min(options.turns, 3)
    size, turns, most = options.megabytes * MB, options.turns, max(options.clients)
    groups = options.only or ["upload", "mtls", "broadcast"]
    rows: list[dict[str, Any]] = []
    growth: dict[int, float] = {}
    if "upload" in groups:
        for clients in options.clients:
            rows += uploads(clients, size, turns)
    if "mtls" in groups:
        rows += secure_uploads(most, size, turns)
    if "broadcast" in groups:
        for clients in options.clients:
            more, growth[clients] = broadcasts(clients, size, turns)
            rows += more
    result: dict[str, Any] = {"benchmark": "fleet-throughput", "megabytes": options.megabytes,
                              "turns": turns, "cores": os.cpu_count(), "rows": rows}  # fmt: skip
    if len(growth) > 1:
        few, many = min(growth), max(growth)
        share = (growth[many] - growth[few]) / (many - few) / options.megabytes
        result["broadcast_growth_mb"] = growth
        result["broadcast_growth_per_further_client_of_model"] = share
        result["broadcast_growth_target"] = "<= 0.02"
    print(json.dumps(rounded(result)))


if __name__ == "__main__":
    main()
