"""Step time and state of the optimizer library beside torch.optim.AdamW, all in one process, in turns.

    python benchmarks/optimizers.py [--repeats 60] [--write]

A perceptron of about a million parameters, gradients computed once: what is timed is ``step()`` alone. Every
repeat times each optimizer once as a for-loop over tensors and once with one kernel per operation over all
tensors (``foreach``), one after the other, so that whatever else the machine does falls on all of them; shown
is each one's shortest time over that of AdamW's for-loop. State is the bytes of every tensor in the state
dict, weights the bytes in which the model is stored. About a minute. ``--write`` puts the table into
docs/optimizers.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from turnout.optim import CLASSP, ECOSGD, FRUGAL, AuON, ECOAdamW, HybridAuON, ModuleOptimizer, coded_

PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"
START, END = "<!-- benchmark: benchmarks/optimizers.py --write -->\n", "<!-- end of benchmark -->"
WIDTHS = (256, 512, 512, 512, 512, 256, 10)
Make = Callable[..., torch.optim.Optimizer]

LIBRARY: dict[str, tuple[type[ModuleOptimizer], dict[str, Any]]] = {
    "AuON": (AuON, {}),
    "HybridAuON, 1 step": (HybridAuON, {}),
    "HybridAuON, 5 steps": (HybridAuON, {"ns_steps": 5}),
    "CLASSP, p = 1": (CLASSP, {"threshold": 1e-6}),
    "CLASSP, p = 2": (CLASSP, {"threshold": 1e-6, "power": 2.0}),
    "ECOSGD, INT8, SR": (ECOSGD, {"lr": 0.1}),
    "ECOSGD, INT8, RTN": (ECOSGD, {"lr": 0.1, "rounding": "rtn"}),
    "ECOSGD, INT8, SR, in codes": (ECOSGD, {"lr": 0.1}),
    "ECOAdamW, INT8, SR": (ECOAdamW, {"lr": 1e-3}),
    "ECOAdamW, FP8, SR": (ECOAdamW, {"lr": 1e-3, "quantizer": "fp8"}),
    "FRUGAL 0.25, blocks": (FRUGAL, {}),
    "FRUGAL 0.25, columns": (FRUGAL, {"projector": "columns"}),
    "FRUGAL 0.25, randk": (FRUGAL, {"projector": "randk"}),
    "FRUGAL 0.25, GaLore": (FRUGAL, {"projector": "galore"}),
    "FRUGAL 0, columns": (FRUGAL, {"projector": "columns", "density": 0.0}),
}


def optimizers(foreach: bool) -> dict[str, Make]:
    """Return what makes each optimizer for a module."""
    made: dict[str, Make] = {
        "torch AdamW": lambda m: torch.optim.AdamW(m.parameters(), foreach=foreach),
        "torch SGD, momentum": lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9, foreach=foreach),
        "torch Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), foreach=foreach),
        "torch Muon (matrices)": lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2]),
    }
    for name, (kind, options) in LIBRARY.items():
        made[name] = lambda m, kind=kind, options=options: kind.for_module(m, foreach=foreach, **options)
    return made


def module(name: str = "") -> nn.Module:
    """Return the perceptron with gradients in place, its matrices in codes if the name says so."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(WIDTHS):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    made = nn.Sequential(*layers[:-1])
    if name.endswith("in codes"):
        coded_(made)
    made(torch.randn(32, WIDTHS[0])).square().mean().backward()
    return made


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the state's tensors, the groups' included."""
    tree = optimizer.state_dict()
    values = [v for state in tree["state"].values() for v in state.values()]
    values += [v for group in tree["param_groups"] for v in group.values()]
    return _bytes(v for v in values if isinstance(v, torch.Tensor))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def measured(repeats: int) -> tuple[dict[tuple[str, bool], float], dict[str, tuple[int, int]]]:
    """Return each optimizer's shortest step in seconds, and its bytes of state and of the model's weights."""
    made: dict[tuple[str, bool], torch.optim.Optimizer] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for foreach in (False, True):
        for name, make in optimizers(foreach).items():
            trained = module(name)
            optimizer = made[name, foreach] = make(trained)
            for _ in range(3):
                optimizer.step()
            sizes[name] = state_bytes(optimizer), _bytes(trained.state_dict().values())
    shortest = dict.fromkeys(made, float("inf"))
    for _ in range(repeats):
        for key, optimizer in made.items():
            started = time.perf_counter()
            optimizer.step()
            shortest[key] = min(shortest[key], time.perf_counter() - started)
    return shortest, sizes


def table(repeats: int) -> str:
    """Return the table as Markdown."""
    count = sum(p.numel() for p in module().parameters())
    seconds, sizes = measured(repeats)
    base = "torch AdamW"
    unit, (state, _) = seconds[base, False], sizes[base]
    lines = [
        f"{count:,} parameters in {len(list(module().parameters()))} tensors on one CPU thread, PyTorch "
        f"{torch.__version__}, shortest of {repeats}; AdamW's step took {1e3 * unit:.2f} ms.",
        "",
        "| optimizer | step time / AdamW | with `foreach` / AdamW | state, bytes | state / AdamW "
        "| weights, bytes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {seconds[name, False] / unit:.2f} | {seconds[name, True] / unit:.2f} "
        f"| {own:,} | {own / state:.2f} | {weights:,} |"
        for name, (own, weights) in sizes.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60, help="times that each step is timed")
    parser.add_argument("--write", action="store_true", help="put the table into docs/optimizers.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = table(arguments.repeats)
    print(text)
    if arguments.write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(START)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{START}\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
