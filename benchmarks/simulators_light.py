"""What the engines themselves cost: rounds of clients that return the model they received.

    python benchmarks/simulators_light.py [--cohorts 10 100] [--model mlp100k] [--executors serial,threads]

Milliseconds per round on Turnout, on Flower's Ray engine and on pfl, where they are installed; every system
takes turns. BlazeFL weighs clients by the examples that they trained on, so it has no such rounds. The
ratio is to the fastest of Turnout's executors. Turnout records each round in its run store. Standard output
has JSON lines, standard error the tables.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from simulators_measure import Measured, measure, quiet_peers, systems
from simulators_report import Results, conditions, markdown_table, show, write_markdown
from simulators_work import MODELS, Workload

COLUMNS = [
    ("system", "system"), ("setting", "setting"), ("cohort", "clients per round"),
    ("ms_per_round", "ms per round"),
    ("times_turnout", "× Turnout's"),
]  # fmt: skip


def light_rows(work: Workload, rows: list[Measured]) -> list[dict[str, Any]]:
    """Return milliseconds per round, and how many times those of Turnout's fastest executor."""
    ours = min((row for row in rows if row.system.kind == "turnout"), key=lambda row: row.median)
    return [
        {
            "system": row.system.name,
            "kind": row.system.kind,
            "setting": row.system.setting,
            "model": work.model,
            "clients": work.clients,
            "cohort": work.cohort,
            "ms_per_round": 1e3 * row.median,
            "times_turnout": statistics.median(a / b for a, b in zip(row.seconds, ours.seconds, strict=True)),
        }
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="mlp100k")
    parser.add_argument("--cohorts", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--executors", default="serial,threads", help="Turnout's executors, comma-separated")
    parser.add_argument("--peers", default="pfl,flower", help="comma-separated; 'none': none")
    parser.add_argument("--common", type=int, default=3, help="rounds before, which choose settings")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each system's block in a turn")
    parser.add_argument("--jsonl", type=Path, help="file of JSON lines to update")
    parser.add_argument("--markdown", type=Path, help="file to write the table into, between marks")
    parser.add_argument("--quick", action="store_true", help="whether it works, not how fast")
    options = parser.parse_args()
    if options.quick:
        options.model, options.cohorts, options.clients = "mlp", [3], 10
        options.turns, options.seconds = 1, 0.05
    if options.common < 2:
        parser.error(f"--common {options.common}: give at least 2 rounds")
    if "batched" in options.executors.split(","):
        parser.error("--executors: 'batched' trains clients, and these do not train; leave it out")
    quiet_peers()
    results, about = Results("simulators-light", options.jsonl), conditions()
    result: list[dict[str, Any]] = []
    for cohort in options.cohorts:
        work = Workload(model=options.model, clients=options.clients, cohort=cohort, epochs=0)
        peers = [] if options.peers == "none" else options.peers.split(",")
        every = systems(work, options.executors.split(","), peers, loops=False)
        measured, skipped = measure(
            work, every, common=options.common, turns=options.turns, seconds=options.seconds
        )
        result += light_rows(work, measured)
        for reason in skipped:
            print(f"left out: {reason}", file=sys.stderr)
    show(f"Clients that do nothing, {options.model}", COLUMNS, result)
    results.add(result)
    results.save()
    if options.markdown is not None:
        machine = f"{about['cores']} cores, load {about['load']:.1f} before"
        said = f"{machine}; {options.model}, {options.clients} registered clients, medians."
        text = f"{said}\n\n{markdown_table(COLUMNS, result)}"
        write_markdown(options.markdown, "light clients", "simulators_light", text)


if __name__ == "__main__":
    main()
