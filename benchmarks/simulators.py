"""Turnout's simulator beside pfl, BlazeFL, Flower on Ray, and loops written by hand, in one run.

    python benchmarks/simulators.py [--models mlp100k cnn100k] [--executors serial,threads] [--quick]

Every system has the same clients, cohorts, minibatches, model, start and local SGD, and the same cores; they
take turns of a few seconds. What a system can be set to is tried for each model and cohort size, in the first
federation. Turnout runs as `turnout simulate` does: participation model, FedAvg, metrics
and run store on, a checkpoint every 10 rounds. Standard output has JSON lines, standard error the tables. The
models after the same rounds are compared, and the run fails where one differs by more than rounding does.
``--jsonl`` and ``--markdown`` replace what the file has of the models of this run and keep the others'.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from simulators_measure import chosen, figures, fixed_costs, measure, narrowed, quiet_peers, systems
from simulators_report import Results, conditions, markdown_table, show, write_markdown
from simulators_work import MODELS, Workload, data_name

PEERS = ("pfl", "blazefl", "flower")
COLUMNS = [
    ("system", "system"), ("setting", "setting"), ("updates_per_s", "client updates/s"),
    ("samples_per_s", "samples/s"), ("of_best_peer", "× best peer"), ("of_limit", "of limit"),
    ("seconds_per_round", "s/round"), ("accuracy", "accuracy"), ("distance", "distance"),
    ("agrees", "agrees"),
]  # fmt: skip
PUBLISHED = [column for column in COLUMNS if column[0] not in ("samples_per_s", "agrees")]
FIXED = [
    ("system", "system"), ("model", "model"), ("clients", "registered"),
    ("fixed_ms_per_round", "fixed ms per round"), ("ms_per_client", "ms per client"),
]  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--cohorts", nargs="+", type=int, default=[10, 100], help="clients per round")
    parser.add_argument("--clients", nargs="+", type=int, default=[100, 10_000], help="registered clients")
    parser.add_argument("--executors", default="serial,threads", help="Turnout's executors, comma-separated")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated; 'none' leaves all out")
    parser.add_argument("--examples", type=int, default=100, help="examples per client")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=1, help="local passes")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--common", type=int, default=5, help="rounds after which models are compared")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each system's block in a turn")
    parser.add_argument("--jsonl", type=Path, help="file of JSON lines to update")
    parser.add_argument("--markdown", type=Path, help="file to write the tables into, between marks")
    parser.add_argument("--quick", action="store_true", help="whether it works, not how fast")
    options = parser.parse_args()
    if options.quick:
        options.models, options.cohorts, options.clients = ["mlp"], [3], [20]
        options.examples, options.common, options.turns, options.seconds = 40, 2, 1, 0.05
    options.peers = [] if options.peers == "none" else options.peers.split(",")
    for peer in options.peers:
        if peer not in PEERS:
            parser.error(f"--peers: {peer!r} is unknown; choose from {', '.join(PEERS)}, or none")
    if options.common < 2:
        parser.error(f"--common {options.common}: give at least 2 rounds")
    return options


def workloads(options: argparse.Namespace, model: str) -> list[Workload]:
    """Return the workloads to measure; a cohort is never larger than its federation."""
    return [
        Workload(model=model, clients=clients, cohort=cohort, examples=options.examples,
                 batch_size=options.batch_size, epochs=options.epochs, lr=options.lr, seed=options.seed)
        for clients in options.clients for cohort in options.cohorts
        if cohort <= clients
    ]  # fmt: skip


def page(
    sections: list[tuple[Workload, list[dict[str, Any]]]], fixed: list[dict[str, Any]], said: str
) -> str:
    """Return the tables for the documentation."""
    parts = [said]
    for work, rows in sections:
        parts += [f"### {work} ({data_name(work.model)})", markdown_table(PUBLISHED, rows)]
    if fixed:
        parts += ["### Cost of a round and of a client", markdown_table(FIXED, fixed)]
    return "\n\n".join(parts)


def measure_model(options: argparse.Namespace, model: str, results: Results) -> list[dict[str, Any]]:
    """Measure one model, publish what came of it, and return the systems' figures."""
    began, about = time.perf_counter(), conditions()
    sections: list[tuple[Workload, list[dict[str, Any]]]] = []
    settings: dict[int, dict[str, str]] = {}  # By cohort size.
    reasons: set[str] = set()
    for work in workloads(options, model):
        every = systems(work, options.executors.split(","), options.peers, loops=True)
        measured, skipped = measure(
            work,
            narrowed(every, settings.get(work.cohort, {})),
            common=options.common,
            turns=options.turns,
            seconds=options.seconds,
        )
        settings.setdefault(work.cohort, chosen(measured))
        sections.append((work, figures(work, measured)))
        results.add(sections[-1][1])
        reasons |= set(skipped)
        title = f"{work} ({data_name(work.model)}), {work.steps} steps of {work.batch_size}"
        show(title, COLUMNS, sections[-1][1])
    rows = [row for _, part in sections for row in part]
    fixed = fixed_costs(rows)
    show("Cost of a round and of a client, by regression over the cohort sizes", FIXED, fixed)
    for reason in sorted(reasons):
        print(f"left out: {reason}", file=sys.stderr)
    results.add({**row, "kind": "line through cohort sizes"} for row in fixed)
    results.save()
    said = (
        f"{about['cores']} cores ({about['cpu']}), load {about['load']:.1f} before, "
        f"Python {about['python']}, PyTorch {about['torch']}; "
        f"{options.examples} examples per client, batches of {options.batch_size}, {options.epochs} local "
        f"epochs, {options.turns} turns of {options.seconds:g} s, medians. Took "
        f"{time.perf_counter() - began:.0f} s."
    )
    if options.markdown is not None:
        write_markdown(options.markdown, f"simulators {model}", "simulators", page(sections, fixed, said))
    return rows


def main() -> None:
    options = arguments()
    quiet_peers()
    results = Results("simulators", options.jsonl)
    rows = [row for model in options.models for row in measure_model(options, model, results)]
    apart = [f"{row['system']} on {row['model']}" for row in rows if not row["agrees"]]
    if apart:
        sys.exit(f"models differ by more than rounding does: {', '.join(apart)}")


if __name__ == "__main__":
    main()
