"""Every strategy, and with it every local update, on every executor: the same run as on `serial`."""

from __future__ import annotations

import inspect
import os
import signal
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from torch import nn

import turnout.strategies  # noqa: F401 - registers the strategies
from turnout.client import client_app
from turnout.client.mods import noisy_link
from turnout.simulation import Bernoulli, LocalGrid
from turnout.simulation.executors.processes import _shares
from turnout.simulation.workers import Job, WorkerPool, pool
from turnout.strategies import FedAvg, RoundReport, Scaffold, StreamingStrategy
from turnout.strategies.rounds import Callback
from turnout.tasks.digits import Digits
from turnout.tasks.task import ClientData, Task
from turnout.wire import ConfigError, find, load_checkpoint, methods, save_checkpoint

N, ROUNDS = 10, 4
SETTINGS: dict[str, dict[str, Any]] = {
    "unbiased-fedavg": {"participation": [0.6] * N},
    "fedstale": {"participation": "estimate"},
    "fedamd": {"anchor_probability": 0.4},
}
# Their clients need a task of their own: test_fleet_own_tasks.py and optimizer_experiments.py have them.
OWN_TASKS = ("bo-rep", "bo-rep-local-upper", "field-space-continual")


@pytest.fixture(scope="module")
def task() -> Digits:
    return Digits(num_clients=N, alpha=0.3, min_examples=5, seed=1)


def make_strategy(slug: str, **more: Any) -> StreamingStrategy:
    target = find("strategy", slug).target
    settings = {**SETTINGS.get(slug, {}), **more}
    if "clients_per_round" in inspect.signature(target).parameters:
        settings["clients_per_round"] = 6
    strategy: StreamingStrategy = target(num_clients=N, seed=3, **settings)
    return strategy


def make_grid(task: Task, executor: str, workers: int | None = 2, **options: Any) -> LocalGrid:
    mods = options.pop("mods", ())
    app = client_app(task, **{"lr": 0.05, "batch_size": 16, "mods": mods, **options})
    clients = task.num_clients
    participation = Bernoulli([0.7] * clients, seed=4)
    return LocalGrid(app, clients, participation=participation, executor=executor, workers=workers)


class Books(Callback):
    """What every round's report says of its clients, in the order of their ids."""

    def __init__(self) -> None:
        self.rounds: list[list[tuple[Any, ...]]] = []

    def on_round_end(self, report: RoundReport) -> None:
        clients = sorted(report.clients, key=lambda c: c.client)
        self.rounds.append(
            [(c.client, c.outcome, c.num_examples, c.weight, c.staleness, c.role, c.train_loss, c.update_norm)
             for c in clients]
        )  # fmt: skip


def run(
    strategy: StreamingStrategy, grid: LocalGrid, task: Task, rounds: int = ROUNDS, **more: Any
) -> list[list[tuple[Any, ...]]]:
    books = Books()
    strategy.start(grid, task.initial_arrays(), num_rounds=rounds, callbacks=[books], **more)
    return books.rounds


@pytest.mark.parametrize("slug", [e.slug for e in methods("strategy") if e.slug not in OWN_TASKS])
def test_every_strategy_on_every_executor(slug: str, task: Digits) -> None:
    serial = make_strategy(slug)
    grid = make_grid(task, "serial")
    books = run(serial, grid, task)
    for executor, workers in (("threads", 2), ("processes", 2), ("batched", 1), ("batched", 2)):
        other, other_grid = make_strategy(slug), make_grid(task, executor, workers)
        other_books = run(other, other_grid, task)
        states, other_states = grid.state_dict()["clients"], other_grid.state_dict()["clients"]
        assert states.keys() == other_states.keys()
        if executor == "batched":
            np.testing.assert_allclose(other.x, serial.x, rtol=1e-5, atol=1e-6)
            for mine, theirs in zip(chain(*books), chain(*other_books), strict=True):
                assert mine[:3] == theirs[:3]
                assert theirs[3:5] == pytest.approx(mine[3:5], nan_ok=True)
                assert theirs[6:] == pytest.approx(mine[6:], rel=1e-4, abs=1e-6, nan_ok=True)
        else:
            assert np.array_equal(other.x, serial.x)
            assert repr(other_books) == repr(books)  # By text: NaN is NaN.
            for node in states:
                assert repr(other_states[node]) == repr(states[node])


@pytest.mark.parametrize("executor", ["processes", "batched"])
def test_a_run_resumes_on_another_executor(executor: str, task: Digits, tmp_path: Path) -> None:
    whole = make_strategy("scaffold")
    run(whole, make_grid(task, "serial"), task, rounds=6)

    class Save(Callback):
        def on_round_end(self, report: RoundReport) -> None:
            save_checkpoint(tmp_path / "c.safetensors", report.checkpoint())

    first = make_strategy("scaffold")
    first.start(make_grid(task, executor), task.initial_arrays(), num_rounds=3, callbacks=[Save()])
    tree = load_checkpoint(tmp_path / "c.safetensors")
    then = make_strategy("scaffold")
    run(then, make_grid(task, "serial"), task, rounds=6, resume_from=tree)
    again = make_strategy("scaffold")
    run(again, make_grid(task, executor), task, rounds=6, resume_from=tree)
    if executor == "processes":
        assert np.array_equal(then.x, whole.x)
        assert np.array_equal(again.x, whole.x)
    else:
        np.testing.assert_allclose(then.x, whole.x, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(again.x, whole.x, rtol=1e-5, atol=1e-6)


def test_a_link_between_runs_in_processes_by_messages(task: Digits) -> None:
    models = []
    for executor in ("serial", "processes"):
        grid = make_grid(task, executor, mods=[noisy_link(sigma_up=0.01, sigma_down=0.01, seed=2)])
        assert not grid.trains_cohorts
        strategy = make_strategy("feddyn")
        run(strategy, grid, task)
        models.append(strategy.x)
    assert np.array_equal(models[0], models[1])
    with pytest.raises(
        ConfigError, match=r"executor='batched' trains .* without mods .*executor='processes'"
    ):
        make_grid(task, "batched", mods=[noisy_link(sigma_up=0.01)])


class Normed(Digits):
    """Digits with batch norm, whose buffers travel beside the vector."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)
        )


def test_buffers_beside_the_vector(caplog: pytest.LogCaptureFixture) -> None:
    task = Normed(num_clients=6, alpha=1.0, min_examples=20, seed=1)
    results = {}
    for executor, workers in (("serial", None), ("processes", 2), ("batched", 1)):
        strategy = FedAvg(num_clients=6)
        run(strategy, make_grid(task, executor, workers), task)
        results[executor] = {name: array.numpy() for name, array in strategy.arrays().items()}
    for name, values in results["serial"].items():
        assert np.array_equal(results["processes"][name], values)
        assert np.array_equal(results["batched"][name], values)  # One after the other, and said so.
    assert caplog.text.count("clients are trained one after the other: the model has buffers") == 1


class Failing(Digits):
    """Digits of which client 3 raises in every round, client 4 diverges and client 5 ends its process."""

    ends = False

    def client_data(self, client: int) -> ClientData:
        data = super().client_data(client)
        if client == 3:
            raise RuntimeError("client 3 has no disk")
        if client == 4:
            return ClientData(data.x * float("nan"), data.y)
        if client == 5 and self.ends:
            os.kill(os.getpid(), signal.SIGKILL)
        return data


@pytest.mark.parametrize(
    ("executor", "workers"), [("serial", 1), ("processes", 2), ("batched", 1), ("batched", 2)]
)
def test_clients_that_fail(executor: str, workers: int) -> None:
    task = Failing(num_clients=N, alpha=5.0, min_examples=5, seed=1)
    strategy, grid = Scaffold(num_clients=N), make_grid(task, executor, workers)
    rounds = run(strategy, grid, task)
    outcomes = {client: outcome for client, outcome, *_ in chain(*rounds)}
    assert outcomes == {**dict.fromkeys(range(N), "ok"), 3: "failed", 4: "rejected"}
    reasons = {report.client: report.reason for report in strategy.reports}
    if 3 in reasons:
        assert "client 3 raised in round 4" in reasons[3]
        assert "client 3 has no disk" in reasons[3]
    assert grid.tally.failed == sum(row[0] == 3 for row in chain(*rounds))


def test_a_worker_that_dies_is_replaced() -> None:
    task = Failing(num_clients=N, alpha=5.0, min_examples=5, seed=1)
    strategy, grid = Scaffold(num_clients=N), make_grid(task, "processes", 2)
    run(strategy, grid, task, rounds=2)
    task.ends = True  # The workers have their own copy; only those that follow see it.
    for worker in grid._executor._pool._workers:  # type: ignore[attr-defined]
        os.kill(worker.pid, signal.SIGKILL)
    books = run(strategy, grid, task, rounds=6, resume_from={"round": 2, "strategy": strategy.state_dict()})
    failed = [row[0] for row in chain(*books) if row[1] == "failed"]
    assert 5 in failed
    assert books[-1]
    assert {row[0] for row in books[-1] if row[1] == "ok"} >= {1, 2, 6, 7} & {row[0] for row in books[-1]}
    assert any("was ended by SIGKILL" in report.reason for report in strategy.reports) or 5 not in {
        row[0] for row in books[-1]
    }


@pytest.mark.parametrize("executor", ["processes", "batched"])
def test_workers_that_do_not_start_are_done_without(
    executor: str, task: Digits, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serial, other = make_strategy("scaffold"), make_strategy("scaffold")
    run(serial, make_grid(task, "serial"), task)
    monkeypatch.setattr(pool, "_START_SECONDS", 0.05)
    monkeypatch.setattr(pool, "_serve", lambda *_: time.sleep(60))
    grid = make_grid(task, executor)
    run(other, grid, task)
    np.testing.assert_allclose(other.x, serial.x, rtol=0, atol=1e-6 if executor == "batched" else 0)
    assert "worker process 0 did not start in 3 attempts" in caplog.text
    assert grid.executor.startswith("this process alone")


def test_shared_memory_does_not_grow_with_rounds(task: Digits) -> None:
    strategy, grid = make_strategy("scaffold"), make_grid(task, "processes", 2)
    sizes: list[int] = []

    class Watch(Callback):
        def on_round_end(self, report: RoundReport) -> None:
            heaps = grid._executor._pool._heaps  # type: ignore[attr-defined]
            sizes.append(sum(os.fstat(heap.fileno()).st_size for heap in heaps))

    strategy.start(grid, task.initial_arrays(), num_rounds=60, callbacks=[Watch()])
    # A round's replies and new states that stayed behind would be 20 MB in 40 rounds.
    assert sizes[-1] - sizes[20] <= 4 << 20


@pytest.mark.parametrize(
    ("clients", "workers", "least", "sizes"),
    [
        (0, 2, 1, []),
        (1, 2, 10, [1]),
        (10, 2, 1, [3, 2, 2, 1, 1, 1]),
        (10, 2, 10, [5, 5]),
        (21, 2, 10, [11, 10]),  # Not 10, 10 and 1: one alone costs half as much as ten together.
        (30, 2, 10, [8, 8, 8, 6]),  # Nor 10, 10 and 10, for two workers.
        (100, 2, 10, [30, 20, 20, 10, 10, 10]),
        (500, 2, 50, [64, 64, 64, 64, 64, 50, 50, 50, 30]),
    ],
)
def test_a_cohort_is_cut_into_jobs_of_which_all_workers_get_the_same(
    clients: int, workers: int, least: int, sizes: list[int]
) -> None:
    jobs = list(_shares(range(clients), workers, least, 64))
    assert [len(job) for job in jobs] == sizes
    assert list(chain(*jobs)) == list(range(clients))


class Whose(Job):
    """A job whose result is the process that did it."""

    def __init__(self, nodes: range) -> None:
        self.nodes = tuple(nodes)

    def command(self) -> dict[str, Any]:
        return {}

    def finish(self, answer: dict[str, Any], *, late: bool) -> int:
        return int(answer["pid"])

    def lost(self, reason: str) -> int:
        raise AssertionError(reason)


def test_a_job_goes_to_the_worker_with_the_fewest_clients() -> None:
    pool = WorkerPool(2, lambda _: lambda _: {"pid": os.getpid()})
    jobs = [Whose(range(4)), Whose(range(4, 5)), Whose(range(5, 6)), Whose(range(6, 7))]
    first, *others = pool.run(jobs, deadline=None, ordered=True)  # All four are handed out at once.
    assert len(set(others)) == 1
    assert first not in others


def test_workers_end_with_the_grid(task: Digits) -> None:
    grid = make_grid(task, "processes", 2)
    run(FedAvg(), grid, task, rounds=1)
    pids = [worker.pid for worker in grid._executor._pool._workers]  # type: ignore[attr-defined]
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    del grid
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


class Slow(Digits):
    """Digits whose client 0 is slow to find its data."""

    def client_data(self, client: int) -> ClientData:
        if client == 0:
            time.sleep(0.6)
        return super().client_data(client)


def test_clients_that_are_late() -> None:
    task = Slow(num_clients=4, alpha=5.0, seed=1)
    app = client_app(task, lr=0.05, batch_size=16)
    grid = LocalGrid(app, 4, executor="processes", workers=2)
    strategy = FedAvg()
    strategy.start(grid, task.initial_arrays(), num_rounds=1, timeout=0.3)
    assert 0 in {report.client for report in strategy.reports if report.outcome == "missing"}
    assert grid.tally.late >= 1
    grid.state_dict()  # Waits for the late one.


def pick(app: Any, clients: int = N, p: float = 0.7, **options: Any) -> str:
    return LocalGrid(
        app, clients, participation=Bernoulli([p] * clients, seed=1), executor="auto", **options
    ).executor


class Convolving(Digits):
    """Digits on a model that is no plain sequence."""

    def model(self) -> nn.Module:
        class Wide(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(64, 400), nn.Linear(400, 10)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.second(torch.sigmoid(self.first(x.flatten(1))) * 2)

        return Wide()


def test_auto_picks_and_says_so(task: Digits, make_app: Callable[..., Any]) -> None:
    app = client_app(task)
    assert pick(app, workers=2).startswith("processes, 2 workers")
    assert pick(app, workers=1) == "serial (one client at a time)"
    assert pick(app, workers=2, p=0.1).startswith("serial")
    assert pick(app, workers=2, exact=False).startswith(
        "batched, 2 workers (this model's gradients are written"
    )
    assert pick(make_app(), workers=2) == "threads, 2 workers (an app of your own)"
    wide = client_app(Convolving(num_clients=N, seed=1))
    assert pick(wide, workers=2, exact=False).startswith("processes, 2 workers")
    assert pick(client_app(task, mods=[noisy_link(0.1)]), workers=2, exact=False).startswith("processes")


def test_workers_are_as_many_as_there_is_work_and_files_for(make_app: Callable[..., Any]) -> None:
    assert LocalGrid(make_app(), 3, executor="threads", workers=9).executor == "threads, 3 workers"
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=r"workers=1000000 need two open files each.*use at most"):
        LocalGrid(make_app(), 1_000_000, executor="processes", workers=1_000_000)
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_message_per_client(task: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round in bulk makes no message at all, on either side."""
    import turnout.strategies.streaming as streaming

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a message was made")

    monkeypatch.setattr(streaming, "request", refuse)
    for executor in ("processes", "batched"):
        strategy = FedAvg()
        run(strategy, make_grid(task, executor), task)
        assert strategy.reports


def test_queries_reach_clients_in_processes(task: Digits) -> None:
    from turnout.wire.flower import request

    answers = []
    for executor in ("serial", "processes"):
        grid, strategy = make_grid(task, executor), make_strategy("rerce-fed", rho=0.1)
        run(strategy, grid, task)
        cohort = strategy.configure_cohort(ROUNDS + 1, strategy.arrays(), ConfigRecord(), grid)
        content = cohort.parts[0].content
        messages = [request(content, dst_node_id=n, message_type="query.local_model") for n in (0, 1)]
        replies = {r.metadata.src_node_id: r for r in grid.send_and_receive(messages)}
        answers.append([replies[n].content["arrays"]["1.weight"].numpy() for n in (0, 1)])
    assert np.array_equal(answers[0], answers[1])
