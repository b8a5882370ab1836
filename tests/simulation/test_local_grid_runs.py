from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from turnout.simulation import Bernoulli, LocalGrid, Markov, ParticipationModel, Trace
from turnout.wire import (
    CheckpointError,
    ConfigError,
    as_array,
    as_bf16_array,
    load_checkpoint,
    save_checkpoint,
    view,
)
from turnout.wire.flower import reply

MakeApp = Callable[..., ClientApp]
Federate = Callable[..., np.ndarray]
N = 12


def grid_of(app: ClientApp, executor: str = "serial", workers: int | None = None) -> LocalGrid:
    return LocalGrid(app, N, participation=Markov([0.4] * N, seed=3), executor=executor, workers=workers)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_threads_equal_serial_bit_for_bit(workers: int, make_app: MakeApp, federate: Federate) -> None:
    serial, threads = grid_of(make_app()), grid_of(make_app(), "threads", workers)
    expected, got = federate(serial, 1, 15), federate(threads, 1, 15)
    assert expected.any()
    assert np.array_equal(expected, got)
    _assert_same_tree(serial.state_dict(), threads.state_dict())


def test_torch_clients_use_one_thread_and_the_setting_is_restored(federate: Federate) -> None:
    torch = pytest.importorskip("torch")
    app = ClientApp()
    seen: set[int] = set()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen.add(torch.get_num_threads())
        generator = torch.Generator().manual_seed(context.node_id)
        x = torch.tensor(view(message.content["arrays"]["x"]).copy())
        big = torch.randn(400, 400, generator=generator)
        y = (x.sum() + (big @ big).sum() + big.sum()).repeat(4).numpy()
        return reply(RecordDict({"arrays": ArrayRecord({"x": as_array(y)})}), to=message)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = [federate(grid_of(app, e, w), 1, 3) for e, w in (("serial", None), ("threads", 3))]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {1}
    assert np.array_equal(runs[0], runs[1])


@pytest.mark.parametrize("executor", ["serial", "threads"])
@pytest.mark.parametrize("through_file", [False, True])
def test_interrupted_and_resumed_is_uninterrupted(
    executor: str, through_file: bool, make_app: MakeApp, federate: Federate, tmp_path: Path
) -> None:
    whole = grid_of(make_app(), executor)
    expected = federate(whole, 1, 12)
    first = grid_of(make_app(), executor)
    half = federate(first, 1, 6)
    tree = first.state_dict()
    if through_file:
        save_checkpoint(tmp_path / "grid.safetensors", {"grid": tree})
        tree = load_checkpoint(tmp_path / "grid.safetensors")["grid"]
    second = grid_of(make_app(), executor)
    second.load_state_dict(tree)
    assert second.server_round == 6
    assert np.array_equal(federate(second, 7, 12, half), expected)
    _assert_same_tree(second.state_dict(), whole.state_dict())


@pytest.mark.parametrize("in_rows", [False, True])
def test_state_of_every_kind_survives_a_checkpoint(in_rows: bool, tmp_path: Path) -> None:
    state = RecordDict(
        {
            "z/arrays": ArrayRecord(
                {
                    "b": as_array(np.arange(6, dtype=np.float32).reshape(2, 3)),
                    "a.stock": Array(np.array([1, 2], dtype=np.int64)),
                    "scalar": as_array(np.array(2.5)),
                    "empty": as_array(np.zeros((0, 3), dtype=np.float16)),
                    "half": as_bf16_array(np.array([1.5, -2.0], dtype=np.float32)),
                }
            ),
            "metrics": MetricRecord({"n": 3, "nan": float("inf"), "list": [1.5, 2.5], "none": []}),
            "config": ConfigRecord(
                {"b": True, "raw": b"\x00\xff", "s": "ü", "raws": [b"a", b""], "i": [1, 2], "no-bytes": b""}
            ),
        }
    )
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if not context.state:
            context.state = state.copy()
        return reply(context.state.copy(), to=message)

    grid = LocalGrid(app, 3)
    list(grid.send_and_receive([grid.create_message(RecordDict(), "train", 1, "")]))
    if in_rows:
        grid.keep_rows(tmp_path, "run")
    save_checkpoint(tmp_path / "c.safetensors", grid.state_dict())
    again = LocalGrid(app, 3)
    again.load_state_dict(load_checkpoint(tmp_path / "c.safetensors"))
    (answer,) = again.send_and_receive([again.create_message(RecordDict(), "train", 1, "")])
    assert list(answer.content) == list(state)
    for key, record in state.items():
        assert list(answer.content[key]) == list(record)
        assert answer.content[key] == record
    assert type(answer.content["config"]["b"]) is bool
    assert list(again.state_dict()["clients"]) == ["1"]


def test_state_of_another_federation_is_refused(make_app: MakeApp, federate: Federate) -> None:
    grid = LocalGrid(make_app(), 5)
    federate(grid, 1, 1)
    with pytest.raises(CheckpointError, match="state of client 2, but this grid has clients 0 to 1"):
        LocalGrid(make_app(), 2).load_state_dict(grid.state_dict())
    with pytest.raises(CheckpointError, match="unknown kind of record 'models'"):
        grid.load_state_dict({"round": 1, "clients": {"0": [["a", "models", []]]}})


# Flower's own strategies, which know nothing of rounds on the grid.


def run_fedavg(
    app: ClientApp,
    participation: ParticipationModel | None,
    *,
    fraction_evaluate: float = 0.0,
    rounds: int = 4,
    executor: str = "serial",
    workers: int | None = None,
) -> tuple[LocalGrid, np.ndarray, dict[int, float]]:
    grid = LocalGrid(app, N, participation=participation, executor=executor, workers=workers)
    result = FedAvg(fraction_evaluate=fraction_evaluate).start(
        grid, ArrayRecord({"x": Array(np.zeros(4, dtype=np.float32))}), num_rounds=rounds
    )
    distances = {r: float(m["distance"]) for r, m in result.evaluate_metrics_clientapp.items()}
    return grid, result.arrays["x"].numpy(), distances


@pytest.mark.parametrize("executor", ["serial", "threads"])
@pytest.mark.parametrize("fraction_evaluate", [0.0, 1.0])
def test_stock_fedavg_runs_end_to_end(executor: str, fraction_evaluate: float, make_app: MakeApp) -> None:
    asked: dict[int, list[int]] = {}
    app = make_app(lambda client, m: asked.setdefault(m.content["config"]["server-round"], []).append(client))
    masks = np.random.default_rng(5).random((5, N)) < 0.5
    grid, x, distances = run_fedavg(
        app, Trace(masks), fraction_evaluate=fraction_evaluate, executor=executor, workers=3
    )
    assert {r: sorted(clients) for r, clients in asked.items()} == {
        r: np.flatnonzero(masks[r - 1]).tolist() for r in (1, 2, 3, 4)
    }
    assert grid.server_round == 5
    assert np.isfinite(x).all()
    assert x.any()
    assert sorted(distances) == ([1, 2, 3, 4] if fraction_evaluate else [])


def test_stock_fedavg_gives_the_same_bits_on_threads(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Flower samples the cohort's order with the global generator.
    monkeypatch.setattr("random.sample", lambda population, k: list(population)[:k])
    model = Bernoulli([0.5] * N, seed=2)
    _, serial, _ = run_fedavg(make_app(), model)
    _, threads, _ = run_fedavg(make_app(), model, executor="threads", workers=4)
    assert np.array_equal(serial, threads)


def test_rounds_too_empty_for_a_stock_strategy_pass_unused(make_app: MakeApp) -> None:
    masks = np.zeros((7, N), dtype=bool)
    masks[2, :4] = masks[5, 4:9] = True
    masks[0, 0] = masks[3, 5] = True
    asked: list[tuple[int, int]] = []
    app = make_app(lambda client, m: asked.append((m.content["config"]["server-round"], client)))
    grid, _, _ = run_fedavg(app, Trace(masks), rounds=3)
    assert sorted(asked) == [(1, c) for c in range(4)] + [(2, c) for c in range(4, 9)] + [
        (3, c) for c in range(4)
    ]
    assert grid.server_round == 7 + 3 + 1


def test_participation_that_never_suffices_is_an_error_and_no_hang(make_app: MakeApp) -> None:
    grid = LocalGrid(make_app(), 3, participation=Trace([[1, 0, 0], [0, 1, 0]]))
    with pytest.raises(ConfigError, match=r"none of rounds 1 to 10000 has 2 clients available; raise"):
        grid.get_node_ids()
    assert LocalGrid(
        make_app(), 3, participation=Trace([[0, 0, 1]]), min_available_nodes=1
    ).get_node_ids() == [2]
    grid = LocalGrid(make_app(), 3, participation=Trace([[0, 0, 0]]))
    grid.start_round(1)
    assert grid.get_node_ids() == []


def test_only_training_moves_the_round_on(make_app: MakeApp, ask: Callable[..., list[Message]]) -> None:
    grid = LocalGrid(make_app(), 3)
    list(grid.send_and_receive(ask(range(3), message_type="evaluate")))
    list(grid.send_and_receive([]))
    assert grid.server_round == 1
    list(grid.send_and_receive(ask(range(3))))
    assert grid.server_round == 2
    grid.start_round(5)
    list(grid.send_and_receive(ask(range(3))))
    assert grid.server_round == 5


def _assert_same_tree(a: object, b: object) -> None:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
    elif isinstance(a, dict) and isinstance(b, dict):
        assert list(a) == list(b)
        for key in a:
            _assert_same_tree(a[key], b[key])
    elif isinstance(a, list) and isinstance(b, list):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            _assert_same_tree(left, right)
    else:
        assert a == b
