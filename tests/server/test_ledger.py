"""The ledger of simulations: computed again from who took part, every strategy gives the same models."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

import turnout.strategies  # noqa: F401 - registers the strategies
from turnout.client import client_app
from turnout.server import RunDescription, RunRecorder, RunStore
from turnout.server.ledger import check_ledger
from turnout.server.ledger_replay import Replay
from turnout.simulation import Bernoulli, LocalGrid
from turnout.tasks.digits import Digits
from turnout.wire import find, methods

N, ROUNDS = 6, 4
SETTINGS: dict[str, dict[str, Any]] = {
    "unbiased-fedavg": {"participation": [0.6] * N},
    "fedstale": {"participation": "estimate"},
    "fedamd": {"anchor_probability": 0.4},
}
TASK = Digits(num_clients=N, model="softmax", alpha=0.5, seed=1)


def strategy(slug: str) -> Any:
    target = find("strategy", slug).target
    settings = dict(SETTINGS.get(slug, {}))
    if "clients_per_round" in inspect.signature(target).parameters:
        settings["clients_per_round"] = 3
    return target(num_clients=N, seed=3, **settings)


def clients(*, lr: float = 0.05, fails: bool = False) -> Any:
    def failing(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        reply = call_next(message, context)
        if int(context.node_config["partition-id"]) == 2 and message.content["config"]["server-round"] == 2:
            raise RuntimeError("planned failure")
        return reply

    mods = [failing] if fails else []
    return client_app(TASK, lr=lr, local_steps=2, batch_size=8, seed=5, anchor_batch_size=16, mods=mods)


def record(parent: Path, slug: str, *, every: int = 1) -> tuple[RunStore, str]:
    """Run ``slug`` with clients that come and go and one that fails once."""
    store = RunStore(parent)
    about = RunDescription(
        name="ledger", strategy=slug, task="digits", seed=3, num_rounds=ROUNDS, num_clients=N, config={}
    )
    grid = LocalGrid(clients(fails=True), N, participation=Bernoulli([0.7] * N, seed=4))
    with RunRecorder.create(store, parent, about, checkpoint_every=every) as recorder:
        strategy(slug).start(grid, TASK.initial_arrays(), num_rounds=ROUNDS, callbacks=[recorder])
    return store, recorder.run.id


def again(slug: str, **changes: Any) -> Replay:
    return Replay(
        strategy=strategy(slug), grid=LocalGrid(clients(**changes), N), arrays=TASK.initial_arrays()
    )


@pytest.mark.parametrize("slug", [e.slug for e in methods("strategy") if not e.slug.startswith("bo-rep")])
def test_the_ledger_gives_every_model_again(slug: str, tmp_path: Path) -> None:
    store, run_id = record(tmp_path, slug)
    outcomes = {row.outcome for row in store.client_rounds(run_id)}
    assert outcomes <= {"ok", "failed"}
    assert check_ledger(store, run_id, replay=again(slug), remote=False) == []
    rows = store.rounds(run_id)
    assert len({row.model_sha256 for row in rows}) > 1
    assert all(row.checkpoint_seconds is not None for row in rows)
    assert (rows[0].sent_bytes, rows[0].received_bytes) == (None, None)


def test_other_clients_give_another_model(tmp_path: Path) -> None:
    store, run_id = record(tmp_path, "fedavg")
    (problem,) = check_ledger(store, run_id, replay=again("fedavg", lr=0.06), remote=False)
    assert problem.startswith("round 1 ended with model")


def test_a_simulation_has_no_request_numbers(tmp_path: Path) -> None:
    store, run_id = record(tmp_path, "fedavg")
    problems = check_ledger(store, run_id)
    assert len(problems) == sum(row.participants for row in store.rounds(run_id))
    assert "has no task and no attempt and no reply_crc32" in problems[0]


def test_a_checkpoint_of_another_model_is_noticed(tmp_path: Path) -> None:
    from turnout.wire import load_checkpoint, save_checkpoint

    store, run_id = record(tmp_path, "fedavg", every=2)
    assert check_ledger(store, run_id, remote=False) == []
    path = store.directory_of(store.run(run_id)) / "checkpoints" / "round-000004.safetensors"
    tree = load_checkpoint(path)
    tree["strategy"]["x"] = np.nextafter(tree["strategy"]["x"], np.float32(1))
    save_checkpoint(path, tree)
    (problem,) = check_ledger(store, run_id, remote=False)
    assert "round-000004.safetensors holds model" in problem
    path.unlink()
    (problem,) = check_ledger(store, run_id, remote=False)
    assert "the checkpoint of round 4 cannot be read" in problem
