"""Federated fine-tuning of MiniLM on VADER's four domains: every adapter, a linear head, full training.

    python benchmarks/peft.py [--only lora paca] [--out docs/results/peft.jsonl]
    python benchmarks/peft.py --publish   # the table of docs/peft-benchmarks.md, from the figures

Four silos (tweets, Amazon reviews, film reviews, editorials) with 800 sentences each, cut at 32 tokens. First
a linear head is trained federatedly on frozen embeddings, 10 rounds of a local epoch: the row ``head``. Every
other method starts from that head: 10 rounds of FedAvg, in which each silo takes 8 AdamW steps (state anew
each round) of 16 sentences. Accuracy is the mean over the four domains, 500 test sentences each, so that one
standard error is about 0.8 points. A method's learning rate is the one of its grid with the lowest validation
loss after 5 rounds, on a part of the training sets; the test set is looked at once, at the end.

Each method runs in a process of its own on one thread. ``seconds`` is the CPU time of the 10 rounds, so that
others on the machine matter less; ``peak_mb`` the process's largest resident memory in them; ``saved_mb``
what autograd keeps for the backward pass of 16 sentences of 32 tokens. ``up`` and ``down`` are the bytes of
one client's messages in one round as the gRPC fleet frames them. Finished methods are in ``--out`` and are
not measured again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS = DOCS / "results" / "peft.jsonl"
PAGE = DOCS / "peft-benchmarks.md"
BEGIN, END = "<!-- table: written by --publish -->", "<!-- end of table -->"

ROUNDS, STEPS, BATCH, TUNING_ROUNDS = 10, 8, 16, 5
TASK: dict[str, Any] = {
    "name": "vader-sentiment", "tokens": 32, "train_per_domain": 800, "test_per_domain": 500,
}  # fmt: skip
VALIDATION = {"holdout": "validation", "test_per_domain": 100}
FROZEN = {"model": "frozen-minilm"}
EPOCHS = {"local_steps": "none", "local_epochs": 1}
HEAD_LR = 1e-3  # The best of the row `head`.
GRID = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Method:
    """What is measured: ``peft`` is the adapter's section (None: no adapter), ``grid`` its learning rates."""

    name: str
    peft: dict[str, Any] | None = None
    grid: tuple[float, ...] = GRID
    rounds: int = ROUNDS
    task: dict[str, Any] = field(default_factory=dict)
    client: dict[str, Any] = field(default_factory=dict)


# Sizes are those that come nearest to LoRA's 73,728 numbers on query and value. Scales far above the
# methods' own are the best of two or three by validation loss after 5 rounds: with their own, 80 steps
# hardly move the weights.
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16},
    "miss": {"r": 16},
    "bone": {"r": 16},
    "paca": {"r": 16, "paca_alpha": 16},
    "s2ft": {"target_modules": r".*layer\.\d+\.output\.dense", "d_ratio": 0.021},
    "lift": {"r": 8, "filter_rank": 32},
    "adalora": {
        "init_r": 12, "target_r": 8, "lora_alpha": 768, "init_std": 0.05, "tinit": 4, "tfinal": 16,
        "total_step": ROUNDS * STEPS,
    },
    "hut": {"r": 8, "alpha": 1024},
    "ist": {"base": {"name": "lora", "r": 8, "lora_alpha": 16}, "interval": STEPS},
    "snella": {"r": 8, "kernel_scale": 8.0, "total_step": ROUNDS * STEPS},
    "tera": {"scale": 64.0},
}  # fmt: skip
GRIDS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("lora", "miss", "bone", "paca", "s2ft", "lift"), (1e-4, *GRID)),
    "weight-compander": (3e-5, 1e-4, 3e-4),
}


def every_method() -> dict[str, Method]:
    """Return the methods: the baselines and whatever adapters are registered."""
    from turnout.experiment.methods import load_methods
    from turnout.wire import methods

    load_methods()
    head: dict[str, Any] = {"grid": (3e-4, 1e-3, 3e-3), "task": FROZEN, "client": EPOCHS}
    pooled = {"partition": "iid", "num_clients": 1}
    found = [
        Method("head", **head),
        Method("head-longer", rounds=2 * ROUNDS, **head),
        *(
            Method(e.slug, {"name": e.slug, **OPTIONS.get(e.slug, {})}, GRIDS.get(e.slug, GRID))
            for e in methods("adapter")
        ),
        Method(
            "lora-central", {"name": "lora", **OPTIONS["lora"]}, task=pooled, client={"batch_size": 4 * BATCH}
        ),
        Method("full", grid=(3e-6, 1e-5, 3e-5, 1e-4)),
    ]
    return {method.name: method for method in found}


def experiment(method: Method, lr: float, rounds: int, seed: int, **task: Any) -> Any:
    """Return the method's experiment."""
    from turnout.experiment import Experiment

    table: dict[str, Any] = {
        "run": {"rounds": rounds, "seed": seed},
        "task": {**TASK, **method.task, **task},
        "client": {
            "optimizer": "adamw", "lr": lr, "batch_size": BATCH, "local_steps": STEPS, "device": "cpu",
            **method.client,
        },
        "strategy": {"name": "fedavg"},
        "participation": {"model": "bernoulli", "probabilities": 1.0},
        "link": {"name": "meter"},
        "simulation": {"executor": "serial"},
    }  # fmt: skip
    if method.peft is not None:
        table["peft"] = method.peft
    return Experiment.from_dict(table)


def train(method: Method, lr: float, rounds: int, seed: int, **task: Any) -> tuple[dict[str, Any], Any]:
    """Return the scores of one run with its cost, and the task."""
    from turnout.experiment.build import build

    federation = build(experiment(method, lr, rounds, seed, **task))
    initial = federation.task.initial_arrays()
    if method.task != FROZEN:
        for name, array in head(seed, **task).items():
            initial[f"classifier.{name}"] = array
    METER.clear()
    began = time.process_time()
    arrays = federation.strategy.start(federation.grid, initial, num_rounds=rounds).arrays
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    scores = federation.task.evaluate(arrays)
    return {**scores, "lr": lr, "seconds": seconds, "peak_mb": peak, **METER.means()}, federation.task


@cache
def head(seed: int, **task: Any) -> Any:
    """Return the arrays of the linear head that the other methods start from."""
    from turnout.experiment.build import build

    method = Method("head", task=FROZEN, client=EPOCHS)
    made = build(experiment(method, HEAD_LR, ROUNDS, seed, **task))
    return made.strategy.start(made.grid, made.task.initial_arrays(), num_rounds=ROUNDS).arrays


class Meter(dict[str, list[int]]):
    """Bytes of every message of a run, by direction."""

    def means(self) -> dict[str, float]:
        return {name: sum(sizes) / len(sizes) for name, sizes in self.items()}


METER = Meter()


def register_meter() -> None:
    """Make the link "meter" known: it notes how long each request and reply is on the wire."""
    from turnout.wire import register
    from turnout.wire.replies import encode_reply
    from turnout.wire.work import WorkEncoder

    @register("meter", kind="link", summary="Notes the bytes of every message")
    class MeterLink:
        def __init__(self, *, seed: int = 0) -> None:
            pass

        def __call__(self, message: Any, context: Any, call_next: Any) -> Any:
            work = WorkEncoder(count(1), server_round=1).encode(message.content, "train", "")
            frames = sum(len(frame) for payload in work.payloads for frame in payload.frames)
            METER.setdefault("down", []).append(len(work.head) + frames)
            known = {layout.digest: layout for layout in work.layouts.values()}
            reply = call_next(message, context)
            encoded = encode_reply(reply.content, known)
            METER.setdefault("up", []).append(len(encoded.head) + sum(p.nbytes for p in encoded.pieces))
            return reply


def saved_megabytes(task: Any) -> float:
    """Return what autograd keeps for one batch of 16 sentences of 32 tokens: storages, each once."""
    import torch

    model = task.seeded_model(0)
    owned = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }  # Counted elsewhere.
    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    data = task.client_data(0)
    if data.x.dtype.is_floating_point:
        x = data.x[:16]
    else:
        x = torch.randint(1000, 30000, (16, 32), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task.loss(model(x), torch.zeros(16, dtype=torch.int64))
    del loss
    return sum(kept.values()) / 2**20


def measure(method: Method, seed: int) -> dict[str, Any]:
    """Choose the method's learning rate, run it, and return its figures."""
    import torch

    torch.set_num_threads(1)
    register_meter()
    tried = []
    rounds = method.rounds if method.task == FROZEN else TUNING_ROUNDS
    for lr in method.grid:
        scores, _ = train(method, lr, rounds, seed, **VALIDATION)
        tried.append({"lr": lr, "loss": scores["loss"], "accuracy": scores["accuracy"]})
        print(f"{method.name}: lr {lr:g}, validation {tried[-1]}", file=sys.stderr, flush=True)
    best = min(tried, key=lambda t: (t["loss"] != t["loss"], t["loss"]))["lr"]
    scores, task = train(method, best, method.rounds, seed)
    from turnout.wire import ParameterLayout

    return {
        "method": method.name,
        "parameters": ParameterLayout.from_arrays(task.initial_arrays()).size,
        "aggregation": task.config.aggregation if method.peft else "exact",
        "options": method.peft or {},
        **scores,
        "saved_mb": saved_megabytes(task),
        "tuning": tried,
        "grid_edge": best in (min(method.grid), max(method.grid)),
        "rounds": method.rounds,
        "seed": seed,
    }


def finished(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the figures in ``path`` by method and seed; the last line of a method counts."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line]
    return {(row["method"], row["seed"]): row for row in rows}


def run_missing(names: Iterable[str], path: Path, seed: int) -> None:
    """Measure what is not in ``path`` yet, each method in a new process; one that fails is left out."""
    for name in names:
        if (name, seed) in finished(path):
            continue
        command = [sys.executable, __file__, "--one", name, "--seed", str(seed)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name}: failed", file=sys.stderr, flush=True)
            continue
        with path.open("a", encoding="utf-8") as file:
            file.write(done.stdout.splitlines()[-1] + "\n")


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Return the figures as a table, the most accurate method first; differences are to ``head``."""
    ordered = sorted(rows, key=lambda row: -row["accuracy"])
    head = next((row["accuracy"] for row in ordered if row["method"] == "head"), None)
    lines = [
        "| method | parameters that travel | up, KB | down, KB | accuracy, % | over `head` | tweets | Amazon "
        "| films | editorials | aggregation | CPU s | peak MB | kept for backward, MB | lr |",
        "| --- |" + " ---: |" * 9 + " --- |" + " ---: |" * 4,
    ]
    for row in ordered:
        cells = [
            f"`{row['method']}`",
            f"{row['parameters']:,}",
            f"{row['up'] / 1000:,.1f}",
            f"{row['down'] / 1000:,.1f}",
            f"{100 * row['accuracy']:.1f}",
            "" if head is None or row["method"] == "head" else f"{100 * (row['accuracy'] - head):+.1f}",
            *(f"{100 * row[f'accuracy_{name}']:.1f}" for name in ("tweets", "amazon", "movies", "nyt")),
            row["aggregation"],
            *(f"{row[name]:.0f}" for name in ("seconds", "peak_mb", "saved_mb")),
            f"{row['lr']:g}" + (" (edge)" if row["grid_edge"] else ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def publish(path: Path, seed: int) -> None:
    """Write the table of ``path`` between the marks of the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    rows = [row for (_, its), row in finished(path).items() if its == seed]
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--publish", action="store_true", help="write the table into docs/peft-benchmarks.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.publish:
        publish(arguments.out, arguments.seed)
        return
    known = every_method()
    if arguments.one:
        print(json.dumps(measure(known[arguments.one], arguments.seed)))
        return
    run_missing(arguments.only or known, arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
