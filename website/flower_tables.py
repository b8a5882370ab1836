"""Tables about Flower: the stock strategies that can be named, and what a round takes on each engine."""

from __future__ import annotations

import inspect
import json
from typing import Any, Final

from published import RESULTS
from turnout.experiment.methods import load_methods
from turnout.wire import methods

_COMMON: Final = ("num_clients", "seed", "max_update_norm", "fraction_train", "fraction_evaluate",
                  "min_train_nodes", "min_evaluate_nodes", "min_available_nodes")  # fmt: skip
_ENGINES: Final = {
    "local": "`turnout simulate`: one process",
    "fleet": "`turnout server` and its clients, gRPC on loopback",
    "ray-turnout": "Flower's simulation on Ray, Turnout's FedAvg",
    "ray-stock": "the same, Flower's FedAvg on `FlowerGrid`",
    "ray-flower": "the same, Flower's FedAvg on Flower's grid",
    "superlink-turnout": "SuperLink and SuperNodes, Turnout's FedAvg",
    "superlink-stock": "the same, Flower's FedAvg on `FlowerGrid`",
    "superlink-flower": "the same, Flower's FedAvg on Flower's grid",
}


def stock_table() -> str:
    """Return the stock strategies: paper, what they do, and the options that only some have."""
    load_methods()
    rows = ["| name | paper | what it does | options of its own |", "| --- | --- | --- | --- |"]
    for entry in methods("flower-strategy"):
        parameters = inspect.signature(entry.target).parameters
        own = [_option(name, p) for name, p in parameters.items() if name not in _COMMON]
        paper = f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})"
        does = entry.summary.removeprefix("Flower's: ")
        rows.append(f"| `{entry.slug}` | {paper} | {does} | {', '.join(own) or 'none'} |")
    return "\n".join(rows)


def _option(name: str, parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return f"**`{name}`**"
    default = "none" if parameter.default is None else json.dumps(parameter.default)
    return f"`{name} = {default}`"


def engine_table() -> str:
    """Return what benchmarks/flower_engines.py wrote: seconds and memory per engine and size of model."""
    lines = (RESULTS / "flower-engines.jsonl").read_text(encoding="utf-8").splitlines()
    results = _by_size([json.loads(line) for line in lines])
    sizes = [f"{result['parameters']:,} parameters, {result['clients']} clients" for result in results]
    head = ["| engine |", *(f" {size}: a round | the server's peak |" for size in sizes)]
    rows = ["".join(head), "| --- |" + " --- | --- |" * len(sizes)]
    for key, words in _ENGINES.items():
        cells = [_cells(result["engines"].get(key)) for result in results]
        rows.append(f"| {words} |{''.join(cells)}")
    return "\n".join(rows)


def _by_size(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one result per size: of several runs the least of each figure, as of the turns of a run."""
    sizes: dict[tuple[int, int], dict[str, Any]] = {}
    for run in runs:
        known = sizes.setdefault((run["parameters"], run["clients"]), {**run, "engines": {}})["engines"]
        for name, figures in run["engines"].items():
            before = known.setdefault(name, figures)
            known[name] = {key: min(value, before[key]) for key, value in figures.items()}
    return list(sizes.values())


def _cells(figures: dict[str, float] | None) -> str:
    if figures is None:
        return " | |"
    return f" {_seconds(figures['round_s'])} | {figures['server_mb']:.0f} MB |"


def _seconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
