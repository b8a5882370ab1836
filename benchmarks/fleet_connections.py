"""Ten thousand connected clients on one server, beside as many bare gRPC streams in the same run.

    python benchmarks/fleet_connections.py [--clients 10000] [--cohort 1000] [--quick]

Prints one JSON line: time to connect, memory per stream, the time of a push (a 10 kB model to all, until all
have answered), each with its ratio, and the time and the errors of rounds of 1,000 clients out of all. The
two servers stand side by side and push in turns. ``transport`` is the push without making the messages.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from fleet_parties import Party, median_of, paired, rounded, take_turns
from fleet_streams import SPARE_DESCRIPTORS, bare_streams, fleet_streams, raise_descriptors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--cohort", type=int, default=1000, help="clients asked in a round (default 1000)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=5, help="pushes of each server (default 5)")
    parser.add_argument("--bytes", type=int, default=10_000, help="size of the model (default 10000)")
    parser.add_argument("--quick", action="store_true", help="200 clients, 50 in a round, 2 turns")
    options = parser.parse_args()
    if options.quick:
        options.clients, options.cohort, options.turns = 200, 50, 2
    asked, possible = options.clients, raise_descriptors() - SPARE_DESCRIPTORS
    clients = min(asked, possible)
    cohort = min(options.cohort, clients)
    if clients < asked:
        print(
            f"only {possible} descriptors are allowed: {clients} clients instead of {asked}", file=sys.stderr
        )
    with (
        Party(bare_streams, clients, options.bytes, name="bare-grpc") as bare,
        Party(fleet_streams, clients, options.bytes, cohort, options.rounds, name="fleet") as fleet,
    ):
        for party in (bare, fleet):
            print(party.name, rounded(party.ready().started), file=sys.stderr)
        theirs, ours = take_turns([bare, fleet], options.turns)
        run = fleet.round(what="rounds")
    memory = fleet.started["kb_per_stream"] / bare.started["kb_per_stream"]
    for row in theirs:
        row["transport"] = row["seconds"]
    result: dict[str, Any] = {
        "benchmark": "fleet-connections",
        "clients": clients,
        "clients_asked": asked,
        "model_bytes": options.bytes,
        "fleet": rounded(fleet.started | {"push_s": median_of(ours), "push_cpu_s": median_of(ours, "cpu")}),
        "bare_grpc": rounded(
            bare.started | {"push_s": median_of(theirs), "push_cpu_s": median_of(theirs, "cpu")}
        ),
        "memory_ratio": memory,
        "memory_target": "<= 1.25",
        "push_ratio": paired(ours, theirs),
        "push_target": "<= 1.5",
        "transport_ratio": paired(ours, theirs, "transport"),
        "connect_ratio": fleet.started["connect_s"] / bare.started["connect_s"],
        "cohort": cohort,
        "rounds": options.rounds,
        "round_s": run["seconds"],
        "errors": run["errors"],
        "lost_streams": run["lost_streams"],
    }
    print(json.dumps(rounded(result)))


if __name__ == "__main__":
    main()
