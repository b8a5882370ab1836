"""What a simulated round costs as the federation grows: time and memory against registered clients.

    python benchmarks/simulator_scaling.py [--clients 100 1000 10000 100000] [--out out/scaling] [--quick]

Clients train nothing: each returns the model it received, moved by a fixed small vector, so that what is
left is the participation model, the engine, the strategy and the run store (checkpoints every 10 rounds).
One part has 100 participants per round whatever N is, one has 0.1% of N. A last part gives FedStale and
MIFA a memory of N x d numbers in a mapped, sparse file; their process may have no more memory of its own than
``--budget-gb``. Every case is a process of its own. Standard output has JSON lines, standard error the
tables; ``--out`` gets the plot.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from fleet_parties import Party
from simulator_scaling_case import Case, run_case
from simulators_report import Results, conditions, markdown_table, show, write_markdown

STRATEGIES = ("fedavg", "fedau", "fedstale", "mifa", "fedvarp")
FIXED, SHARE, LARGE = "100 per round", "0.1% per round", "memory in a file"
CURVE = [
    ("strategy", "strategy"), ("part", "participants"), ("clients", "registered"), ("cohort", "per round"),
    ("median_ms", "ms per round"), ("mean_ms", "mean with checkpoints"), ("first_ms", "first round"),
    ("peak_mb", "peak RSS, MB"),
]  # fmt: skip
MEMORY = [
    ("strategy", "strategy"), ("clients", "registered"), ("parameters", "parameters"),
    ("memory_gb", "N × d, GB"), ("stored_gb", "stored, GB"), ("median_ms", "ms per round"),
    ("limit_ms", "ms to write the rows"), ("own_mb", "own memory, MB"), ("mapped_mb", "mapped pages, MB"),
]  # fmt: skip


def measured(case: Case) -> dict[str, Any]:
    """Run one case in a process of its own."""
    print(f"{case.strategy}, {case.cohort} of {case.clients:,} clients", file=sys.stderr, flush=True)
    with Party(run_case, case, name=case.strategy) as party:
        party.ready()
        figures = party.round()
    return {"strategy": case.strategy, "clients": case.clients, "cohort": case.cohort,
            "parameters": case.parameters, "rounds": case.rounds, **figures}  # fmt: skip


def curve(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of both ways to choose how many take part."""
    rows = []
    for part in (FIXED, SHARE):
        for clients in options.clients:
            cohort = min(options.cohort, clients) if part == FIXED else clients // 1000
            if cohort < 1:
                continue
            for strategy in options.strategies:
                case = Case(strategy, clients, cohort, options.parameters, options.rounds)
                rows.append({"part": part, **measured(case)})
    return rows


def large_memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the memory that exceeds the machine's."""
    clients = int(options.memory_gb * 1e9 / 4 / options.large_parameters)
    rows = []
    for strategy in (name for name in ("fedstale", "mifa") if name in options.strategies):
        case = Case(strategy, clients, min(options.large_cohort, clients), options.large_parameters,
                    options.large_rounds, memory=f"mmap:{options.out}",
                    budget_gb=options.budget_gb)  # fmt: skip
        row = measured(case)
        rows.append({"part": LARGE, **row, "memory_gb": clients * case.parameters * 4 / 1e9})
    return rows


def plot(rows: list[dict[str, Any]], stem: Path) -> list[Path]:
    """Draw milliseconds per round against registered clients, a panel for each part."""
    from turnout.server.plots.style import new_figure, plot_style, save_figure, series_style

    with plot_style():
        figure = new_figure(9.5, 4.0)
        for axes, part in zip(figure.subplots(1, 2, sharex=True, sharey=True), (FIXED, SHARE), strict=True):
            for index, strategy in enumerate(dict.fromkeys(row["strategy"] for row in rows)):
                mine = [row for row in rows if (row["strategy"], row["part"]) == (strategy, part)]
                axes.plot(
                    [row["clients"] for row in mine], [row["median_ms"] for row in mine],
                    marker="o", ms=4, lw=1.6, label=strategy, **series_style(index),
                )  # fmt: skip
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(part)
            axes.set_xlabel("registered clients")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} ms")
            axes.yaxis.set_minor_formatter(lambda value, _: "")
        times = [math.log10(row["median_ms"]) for row in rows]
        figure.axes[0].set_ylim(10 ** math.floor(min(times)), 10 ** math.ceil(max(times)))
        figure.axes[0].set_ylabel("median round")
        figure.axes[1].legend(loc="upper left", fontsize=8.5)
        return save_figure(figure, stem)


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return each strategy's round at the largest N over that at the smallest with as many participants."""
    result = {}
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        mine = [row for row in rows if row["strategy"] == strategy and row["part"] == FIXED]
        most = max(row["cohort"] for row in mine)
        same = [row for row in mine if row["cohort"] == most]
        result[strategy] = same[-1]["median_ms"] / same[0]["median_ms"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", nargs="+", type=int, default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--cohort", type=int, default=100, help="participants of the first part")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--parameters", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds")
    parser.add_argument(
        "--memory-gb", type=float, default=40.0, help="N x d x 4 bytes of the last part; 0: none"
    )
    parser.add_argument("--budget-gb", type=float, default=2.0, help="own memory that the last part may have")
    parser.add_argument("--large-parameters", type=int, default=1_000_000)
    parser.add_argument("--large-cohort", type=int, default=25, help="participants of the last part")
    parser.add_argument("--large-rounds", type=int, default=6, help="each writes 25 rows of 4 MB")
    parser.add_argument("--out", type=Path, default=Path("out/scaling"), help="for the plot and the file")
    parser.add_argument("--jsonl", type=Path, help="file of JSON lines to update")
    parser.add_argument("--markdown", type=Path, help="file to write the tables into, between marks")
    parser.add_argument("--quick", action="store_true", help="whether it works, not how fast")
    options = parser.parse_args()
    if options.quick:
        options.clients, options.cohort, options.rounds = [20, 500], 4, 3
        options.strategies, options.parameters = ["fedstale"], 100
        options.memory_gb, options.large_parameters, options.large_rounds = 0.01, 10_000, 2
    options.out.mkdir(parents=True, exist_ok=True)
    results, about = Results("simulator-scaling", options.jsonl), conditions()
    rows = curve(options)
    show("A round of clients that train nothing", CURVE, rows)
    large = large_memory(options) if options.memory_gb else []
    if large:
        show("A memory of N x d numbers in a mapped file", MEMORY, large)
    for path in plot(rows, options.out / "simulator-scaling"):
        print(f"plot: {path}", file=sys.stderr)
    total = {
        "system": "growth",
        "growth": growth(rows),
        "median_growth": statistics.median(growth(rows).values()),
    }
    results.add([*rows, *large, total])
    results.save()
    if options.markdown is not None:
        machine = f"{about['cores']} cores, load {about['load']:.1f} before"
        said = f"{machine}; {options.parameters:,} parameters, medians."
        text = "\n\n".join([said, markdown_table(CURVE, rows), markdown_table(MEMORY, large)])
        write_markdown(options.markdown, "scaling", "simulator_scaling", text)


if __name__ == "__main__":
    main()
