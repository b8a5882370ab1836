"""Every strategy under uneven, unknown participation: Fashion-MNIST, 100 clients, three participation models.

    python benchmarks/participation.py [--rounds 300] [--seeds 3] [--model mlp] [--out out/participation]

Labels are mixed per client by Dirichlet(0.1), and how often a client takes part follows from its labels,
as in the FedAU paper (arXiv 2306.03401): mean 0.1, at least 0.02; Bernoulli, Markov and Cyclic
participation. Each strategy first gets the same number of tuning runs (six settings of its step sizes,
Bernoulli, a seed that is not used again), judged on one half of the test set; the table reports the other
half. Finished runs are kept in ``--out`` and not repeated. ``--publish`` writes the table and plot that
the docs show.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

DOCS = Path(__file__).resolve().parent.parent / "docs" / "results"
BEGIN, END = "<!-- table: written by --publish -->", "<!-- end of table -->"
CLIENTS = 100
MODELS = ("bernoulli", "markov", "cyclic")
TUNING_SEED = 1000
PAIRS = {"lr": (0.03, 0.1, 0.3)}

# Strategy: its fixed fields and the second knob of its grid; the first is the local step size, three values.
GRIDS: dict[str, tuple[dict[str, Any], str, tuple[Any, Any]]] = {
    "fedavg": ({"weighting": "uniform"}, "server_lr", (1.0, 2.0)),
    "unbiased-fedavg": ({"participation": "known"}, "server_lr", (1.0, 2.0)),
    "average-all": ({}, "server_lr", (3.0, 10.0)),
    "fedvarp": ({"participation": "known"}, "server_lr", (1.0, 2.0)),
    "mifa": ({}, "server_lr", (1.0, 2.0)),
    "fedstale": ({}, "beta", (0.2, 0.5)),
    "fedau": ({}, "server_lr", (1.0, 2.0)),
    "fedamd": ({}, "anchor_probability", (0.3, 0.7)),
    "rerce-fed": ({"continual": False}, "rho", (0.3, 1.0)),
    "dual-admm": ({}, "rho", (0.3, 1.0)),
    "scaffold": ({}, "server_lr", (1.0, 2.0)),
    "fedprox": ({"weighting": "uniform"}, "proximal_mu", (0.01, 0.1)),
    "feddyn": ({}, "dyn_alpha", (0.03, 0.3)),
}
STATE = {  # What the server keeps per client, in vectors; and what a client must keep.
    "fedvarp": "1", "mifa": "1", "fedstale": "1", "fedamd": "1", "dual-admm": "1",
}  # fmt: skip
KNOWS_P = {"unbiased-fedavg", "fedvarp"}
# ADMM needs its local problems solved well enough; the others take 5 steps.
LOCAL_STEPS = {"rerce-fed": 20, "dual-admm": 20}


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    strategy: str
    participation: str
    seed: int
    lr: float
    knob: float
    rounds: int
    model: str

    def key(self) -> str:
        """Return a file name that is this job's own."""
        text = json.dumps(asdict(self) | {"grid": str(GRIDS[self.strategy])}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f"{self.strategy}-{self.participation}-{self.seed}-{digest[:12]}"


@cache
def make_task(seed: int, model: str) -> Any:
    from turnout.tasks import FashionMnist

    return FashionMnist(num_clients=CLIENTS, partition="label-mix", alpha=0.1, model=model, seed=seed)


def make_strategy(job: Job, probabilities: Any) -> Any:
    import turnout.strategies  # noqa: F401 - fills the register
    from turnout.wire import find

    fixed, knob, _ = GRIDS[job.strategy]
    fields: dict[str, Any] = {**fixed, knob: job.knob, "num_clients": CLIENTS, "seed": job.seed}
    if fields.get("participation") == "known":
        fields["participation"] = {i: p for i, p in enumerate(probabilities.tolist()) if p > 0}
    return find("strategy", job.strategy).target(**fields)


def run_job(job: Job) -> dict[str, Any]:
    """Run one job and return its accuracies; rounds are counted as the server counts them."""
    import torch
    from flwr.app import MetricRecord

    from turnout.client import client_app
    from turnout.simulation import LocalGrid, label_correlated
    from turnout.tasks.task import ClientData
    from turnout.wire import find

    torch.set_num_threads(1)
    started = time.perf_counter()
    task = make_task(job.seed, job.model)
    p = label_correlated(task.label_distribution(), mean=0.1, minimum=0.02, alpha=0.1, seed=job.seed)
    participation = find("participation", job.participation).target(p, seed=job.seed, allow_zero=True)
    app = client_app(
        task, lr=job.lr, batch_size=16, local_steps=LOCAL_STEPS.get(job.strategy, 5), seed=job.seed
    )
    grid = LocalGrid(app, CLIENTS, participation=participation, seed=job.seed)
    test = task.test_data()
    half = len(test) // 2
    halves = {
        "tuning": ClientData(test.x[:half], test.y[:half]),
        "report": ClientData(test.x[half:], test.y[half:]),
    }
    data = halves["tuning" if job.seed == TUNING_SEED else "report"]
    model = task.seeded_model(job.seed)
    last = job.rounds - job.rounds // 5
    every = max(1, job.rounds // 50)

    def evaluate(server_round: int, arrays: Any) -> MetricRecord | None:
        if server_round % every and server_round != job.rounds:
            return None
        model.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord(task.evaluate_model(model, data))

    strategy = make_strategy(job, p)
    result = strategy.start(grid, task.initial_arrays(), num_rounds=job.rounds, evaluate_fn=evaluate)
    curve = {r: float(m["accuracy"]) for r, m in result.evaluate_metrics_serverapp.items()}
    tail = [accuracy for r, accuracy in curve.items() if r > last]
    return asdict(job) | {
        "accuracy": float(np.mean(tail)),
        "curve": curve,
        "seconds": time.perf_counter() - started,
        "memory_bytes": strategy.memory_bytes(),
    }


def run_all(jobs: Iterable[Job], out: Path, workers: int, title: str) -> dict[Job, dict[str, Any]]:
    """Run the jobs that have no result file yet, on ``workers`` processes."""
    done: dict[Job, dict[str, Any]] = {}
    todo = []
    for job in jobs:
        path = out / f"{job.key()}.json"
        if path.exists():
            done[job] = json.loads(path.read_text())
        else:
            todo.append(job)
    context = multiprocessing.get_context("spawn")
    with Progress() as progress, ProcessPoolExecutor(workers, mp_context=context) as pool:
        bar = progress.add_task(title, total=len(todo) + len(done), completed=len(done))
        futures = {pool.submit(run_job, job): job for job in todo}
        for future in as_completed(futures):
            job = futures[future]
            done[job] = future.result()
            path = out / f"{job.key()}.json"
            path.with_suffix(".partial").write_text(json.dumps(done[job]))
            path.with_suffix(".partial").replace(path)
            progress.advance(bar)
    return done


def tune(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Return the best (local step size, second knob) of each strategy."""
    jobs = [
        Job(name, "bernoulli", TUNING_SEED, lr, knob, options.tuning_rounds, options.model)
        for name, (_, _, knobs) in GRIDS.items()
        for lr, knob in itertools.product(PAIRS["lr"], knobs)
    ]
    done = run_all(jobs, options.out, options.workers, "tuning")
    best: dict[str, tuple[float, float]] = {}
    for name in GRIDS:
        mine = [job for job in jobs if job.strategy == name]
        winner = max(mine, key=lambda job: np.nan_to_num(done[job]["accuracy"]))
        best[name] = (winner.lr, winner.knob)
    return best


def table(best: dict[str, tuple[float, float]], done: dict[Job, dict[str, Any]], options: Any) -> str:
    """Return the study's result as Markdown."""
    rows = []
    for name, (lr, knob) in best.items():
        cells, overall = [], []
        for participation in MODELS:
            values = [
                r["accuracy"]
                for j, r in done.items()
                if (j.strategy, j.participation) == (name, participation)
            ]
            cells.append(f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}")
            overall.append(float(np.mean(values)))
        note = (
            "known p"
            if name in KNOWS_P
            else f"{LOCAL_STEPS[name]} local steps"
            if name in LOCAL_STEPS
            else ""
        )
        setting = f"lr {lr:g}, {GRIDS[name][1].replace('_', ' ')} {knob:g}"
        rows.append(
            (
                float(np.mean(overall)),
                f"| {name} | {' | '.join(cells)} | {setting} | {note} | {STATE.get(name, '-')} |",
            )
        )
    rows.sort(reverse=True)
    head = (
        "| strategy | Bernoulli | Markov | Cyclic | tuned | needs | vectors per client on the server |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    return "\n".join([head, *(row for _, row in rows)])


def plot(done: dict[Job, dict[str, Any]], best: dict[str, Any], stem: Path) -> None:
    """Draw accuracy over rounds, one panel per participation model: mean and range over seeds."""
    from turnout.server.plots.style import new_figure, palette, plot_style, save_figure, series_style

    shown = ["fedavg", "fedau", "fedstale", "fedamd", "rerce-fed", "mifa", "scaffold"]
    with plot_style():
        figure = new_figure(13.5, 4.2)
        panels = figure.subplots(1, len(MODELS), sharey=True)
        for axes, participation in zip(panels, MODELS, strict=True):
            for index, name in enumerate(shown):
                curves = [
                    r["curve"]
                    for j, r in done.items()
                    if (j.strategy, j.participation) == (name, participation)
                ]
                rounds = sorted(int(r) for r in curves[0])
                values = np.array([[c.get(r, c.get(str(r))) for r in rounds] for c in curves], float)
                style = series_style(index)
                axes.plot(rounds, values.mean(0), lw=1.6, label=name, **style)
                axes.fill_between(
                    rounds, values.min(0), values.max(0), color=style["color"], alpha=0.12, lw=0
                )
            axes.set_title(participation.capitalize())
            axes.set_xlabel("round")
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        panels[0].set_ylabel("test accuracy (mean of seeds; band: range)")
        panels[0].set_ylim(bottom=0.3)
        panels[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8.5)
        for axes in panels:
            axes.tick_params(colors=palette()["ink"])
        save_figure(figure, stem)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--tuning-rounds", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="mlp", choices=["softmax", "mlp", "cnn", "lenet"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/participation"))
    parser.add_argument("--publish", action="store_true", help="write docs/results/participation.*")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    best = tune(options)
    jobs = [
        Job(name, participation, seed, *best[name], options.rounds, options.model)
        for seed in range(options.seeds)
        for participation in MODELS
        for name in GRIDS
    ]
    done = run_all(jobs, options.out, options.workers, "study")
    text = table(best, done, options)
    print(text)
    print(f"\n{len(jobs)} runs, {time.perf_counter() - started:.0f} s in this call")
    stem = (DOCS if options.publish else options.out) / "participation"
    plot(done, best, stem)
    print(f"plot: {stem}.svg")
    if options.publish:
        page = DOCS / "participation.md"
        before, rest = page.read_text().split(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
