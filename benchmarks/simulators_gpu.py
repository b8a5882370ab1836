"""Turnout's simulator on one GPU beside pfl and loops written by hand.

    python benchmarks/simulators_gpu.py [--device cuda] [--executors batched,serial] [--quick]

Two workloads: LeNet on Fashion-MNIST, 100 of 1,000 clients per round; and MiniLM-L6 with LoRA on sentences,
1,000 clients, where only adapters and head are federated. Everything runs on the one device, and all systems
take turns. Utilisation is the mean of NVML's while a system has its turn, if nvidia-ml-py is installed. What
cannot run here is left out with its reason, so the script needs nobody beside it. Standard output has JSON
lines, standard error the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import threading
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simulators_device import device_loop
from simulators_measure import Measured, System, figures, measure, quiet_peers
from simulators_minilm import load_sentences, model_folder
from simulators_pfl import pfl
from simulators_report import Results, conditions, markdown_table, show, write_markdown
from simulators_turnout import turnout
from simulators_work import Workload
from turnout.simulation import EXECUTORS
from turnout.wire import DataError

COLUMNS = [
    ("system", "system"), ("updates_per_s", "client updates/s"), ("samples_per_s", "samples/s"),
    ("of_best_peer", "× best peer"), ("of_limit", "of limit"), ("seconds_per_round", "s/round"),
    ("gpu_percent", "GPU %"), ("gpu_memory_mb", "GPU memory, MB"), ("accuracy", "accuracy"),
    ("distance", "distance"),
]  # fmt: skip
MODELS = ["lenet", "minilm"]
SAMPLE_SECONDS = 0.05


@contextlib.contextmanager
def utilisation(index: int | None) -> Iterator[dict[str, float]]:
    """Collect the GPU's mean utilisation and most memory in use; nothing without a GPU to ask."""
    seen: dict[str, float] = {}
    if index is None:
        yield seen
        return
    import pynvml

    pynvml.nvmlInit()
    handle, ended = pynvml.nvmlDeviceGetHandleByIndex(index), threading.Event()
    percents: list[float] = []
    used: list[float] = []

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            percents.append(float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu))
            used.append(float(pynvml.nvmlDeviceGetMemoryInfo(handle).used) / 1e6)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
        if percents:
            seen |= {"gpu_percent": statistics.mean(percents), "gpu_memory_mb": max(used)}
        pynvml.nvmlShutdown()


def workloads(options: argparse.Namespace) -> tuple[list[Workload], list[str]]:
    """Return the workloads, and why one is left out."""
    common = {"device": options.device, "seed": options.seed}
    work = [Workload(model="lenet", clients=1000, cohort=100, lr=0.05, **common)]
    reasons = []
    try:
        model_folder()
        load_sentences()
        work.append(
            Workload(model="minilm", clients=1000, cohort=100, examples=32, batch_size=16, lr=0.5, **common)
        )
    except DataError as error:
        reasons.append(f"MiniLM: {error}")
    work = [one for one in work if one.model in options.models]
    if options.quick:
        small = {"clients": 20, "cohort": 3, "examples": 8, "batch_size": 4, "test_examples": 16, **common}
        work = [Workload(model=one.model, lr=one.lr, **small) for one in work]
    return work, reasons


def systems(options: argparse.Namespace) -> list[System]:
    every = [System(f"turnout {name}", "turnout", turnout, arguments=(name,))
             for name in options.executors.split(",")]  # fmt: skip
    if not options.no_peers:
        every.append(System("pfl", "peer", pfl, "1 process", (1, 1), "pfl"))
    loops = (
        System(f"tight loop, {variant}", "limit", device_loop, arguments=(variant, options.chunk))
        for variant in ("one by one", "batched")
    )
    return [*every, *loops]


def rows_of(work: Workload, measured: list[Measured]) -> list[dict[str, Any]]:
    """Return the figures with those of the GPU."""
    result = figures(work, measured)
    for row, one in zip(result, measured, strict=True):
        for name in ("gpu_percent", "gpu_memory_mb"):
            values = [seen[name] for seen in one.watched if name in seen]
            row[name] = statistics.median(values) if values else None
        row["device"] = work.device
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    own = [name for name in ("batched", "serial") if name in EXECUTORS]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--executors", default=",".join(own), help="Turnout's executors, comma-separated")
    parser.add_argument("--no-peers", action="store_true", help="leave pfl out")
    parser.add_argument("--chunk", type=int, default=100, help="clients at once in the batched loop")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each system's block in a turn")
    parser.add_argument("--common", type=int, default=5, help="rounds after which models are compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jsonl", type=Path, help="file of JSON lines to update")
    parser.add_argument("--markdown", type=Path, help="file to write the tables into, between marks")
    parser.add_argument("--quick", action="store_true", help="whether it works, not how fast")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # pfl takes a GPU where it sees one.
    import torch

    if options.device != "cpu" and not torch.cuda.is_available():
        sys.exit(f"--device {options.device}: PyTorch {torch.__version__} sees no GPU; use --device cpu.")
    if options.quick:
        options.turns, options.seconds, options.common = 1, 0.05, 2
    quiet_peers()
    name = torch.cuda.get_device_name() if options.device != "cpu" else "CPU"
    watched = 0 if options.device != "cpu" and find_spec("pynvml") is not None else None
    results, said = Results("simulators-gpu", options.jsonl), f"{name}, PyTorch {conditions()['torch']}."
    every, reasons = workloads(options)
    for work in every:
        measured, skipped = measure(
            work, systems(options), common=options.common, turns=options.turns, seconds=options.seconds,
            watch=partial(utilisation, watched),
        )  # fmt: skip
        reasons += skipped
        rows = rows_of(work, measured)
        results.add({**row, "gpu": name} for row in rows)
        show(f"{work}, {name}", COLUMNS, rows)
        if options.markdown is not None:
            text = "\n\n".join([said, f"### {work}", markdown_table(COLUMNS, rows)])
            write_markdown(options.markdown, f"gpu {work.model}", "simulators_gpu", text)
    for reason in reasons:
        print(f"left out: {reason}", file=sys.stderr)
    results.save()


if __name__ == "__main__":
    main()
