"""`start`: rounds, evaluation, callbacks, resume; models that are not plain float32; wrapped strategies."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy
from scripted_grid import Client, ScriptedGrid, SyntheticClient
from strategy_table import KEYS, NODES, ROWS, federation, initial

from turnout.strategies import Callback, FedAU, FedAvg, FedStale, RerceFed, RoundReport, StreamingStrategy
from turnout.wire import CheckpointError, ConfigError, as_array, as_bf16_array, keys, load_checkpoint, view
from turnout.wire.flower import reply


class Log(Callback):
    def __init__(self) -> None:
        self.events: list[Any] = []
        self.reports: list[RoundReport] = []

    def on_start(self, strategy: StreamingStrategy, *, num_rounds: int, first_round: int) -> None:
        self.events.append(("start", num_rounds, first_round))

    def on_round_end(self, report: RoundReport) -> None:
        self.events.append(("round", report.server_round))
        self.reports.append(report)

    def on_finish(self, strategy: StreamingStrategy, result: Any) -> None:
        self.events.append(("finish", type(result).__name__))


class KnownClients(ScriptedGrid):
    """A grid that knows who is registered, is told the round, and has a state: as ours."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rounds: list[int] = []
        self.loaded: Any = None

    def registered_ids(self) -> Iterable[int]:
        return NODES

    def start_round(self, server_round: int) -> None:
        self.rounds.append(server_round)

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": list(self.rounds)}

    def load_state_dict(self, tree: Any) -> None:
        self.loaded = tree


class TestRounds:
    def test_callbacks_and_result(self) -> None:
        log = Log()
        grid = ScriptedGrid(federation())
        seen: list[int] = []

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            seen.append(server_round)
            return None if server_round == 2 else MetricRecord({"accuracy": server_round / 10})

        result = FedAvg().start(grid, initial(), num_rounds=3, evaluate_fn=evaluate, callbacks=[log])
        assert log.events == [("start", 3, 1), ("round", 1), ("round", 2), ("round", 3), ("finish", "Result")]
        assert seen == [0, 1, 2, 3]
        assert result.evaluate_metrics_serverapp == {r: MetricRecord({"accuracy": r / 10}) for r in (0, 1, 3)}
        assert sorted(result.train_metrics_clientapp) == [1, 2, 3]
        assert log.reports[0].evaluate_metrics == {"accuracy": 0.1}
        assert log.reports[1].evaluate_metrics == {}
        assert len(grid.sent) == 3  # Clients evaluate only when asked to.

    def test_clients_evaluate_when_a_config_is_given(self) -> None:
        def client(message: Message) -> Message:
            value = MetricRecord({"num-examples": 1 + message.metadata.dst_node_id % 2, "accuracy": 0.5})
            return reply(RecordDict({"metrics": value}), to=message)

        clients = federation()

        def answer(node: int) -> Client:
            return lambda m: client(m) if m.metadata.message_type == "evaluate" else clients[node](m)

        grid = ScriptedGrid({node: answer(node) for node in NODES}, exchanges=2)
        config = ConfigRecord({"batch": 7})
        result = FedAvg().start(grid, initial(), num_rounds=2, evaluate_config=config)
        assert result.evaluate_metrics_clientapp[2]["accuracy"] == 0.5
        assert grid.sent[1][0].content["config"] == ConfigRecord({"batch": 7, "server-round": 1})

    @pytest.mark.parametrize("rounds", [0, -1])
    def test_no_rounds(self, rounds: int) -> None:
        with pytest.raises(ConfigError, match=f"num_rounds must be at least 1, got {rounds}"):
            FedAvg().start(ScriptedGrid(federation()), initial(), num_rounds=rounds)

    def test_the_initial_model_is_not_changed(self) -> None:
        start = initial()
        before = {name: array.numpy() for name, array in start.items()}
        FedAvg().start(ScriptedGrid(federation()), start, num_rounds=2)
        for name, array in start.items():
            np.testing.assert_array_equal(view(array), before[name])

    def test_a_grid_that_knows_more_is_asked(self) -> None:
        grid = KnownClients(federation(), lambda _: NODES[:2])
        strategy = FedAU()
        strategy.start(grid, initial(), num_rounds=2)
        assert grid.rounds == [1, 2]
        assert len(strategy.clients) == len(NODES)
        other = FedAU()
        other.start(ScriptedGrid(federation(), lambda _: NODES[:2]), initial(), num_rounds=2)
        assert len(other.clients) == 2

    @pytest.mark.parametrize("row", ROWS, ids=str)
    def test_a_grid_that_forgets_to_register_a_node(self, row: Any) -> None:
        grid = KnownClients(federation())
        grid.registered_ids = lambda: NODES[:4]  # type: ignore[method-assign]
        log, strategy = Log(), row.strategy(**({"clients_per_round": 3} if "rerce" in row.name else {}))
        strategy.start(grid, initial(), num_rounds=2, callbacks=[log])
        assert len(strategy.clients) == len(NODES)
        assert log.reports[0].train_metrics["rejected"] == 0

    def test_more_per_round_than_clients_is_an_error_only_when_all_are_known(self) -> None:
        strategy = RerceFed(clients_per_round=8)
        with pytest.raises(ConfigError, match="only 7 clients are registered"):
            strategy.start(KnownClients(federation()), initial(), num_rounds=1)
        grid = ScriptedGrid(federation())
        RerceFed(clients_per_round=8).start(grid, initial(), num_rounds=2)
        assert [len(requests) for requests in grid.sent] == [7, 7]

    def test_an_exception_of_a_callback_ends_the_run(self) -> None:
        class Stop(Callback):
            def on_round_end(self, report: RoundReport) -> None:
                raise KeyboardInterrupt

        grid = ScriptedGrid(federation())
        with pytest.raises(KeyboardInterrupt):
            FedAvg().start(grid, initial(), num_rounds=3, callbacks=[Stop()])
        assert len(grid.sent) == 1

    def test_a_model_that_would_not_be_finite_is_not_taken(self, caplog: pytest.LogCaptureFixture) -> None:
        strategy = FedAvg(server_lr=1e30)
        with caplog.at_level(logging.ERROR):
            result = strategy.start(ScriptedGrid(federation(scale=1e12)), initial(), num_rounds=1)
        assert "the new model is not finite" in caplog.text
        assert dict(result.arrays)["fc.bias"] == initial()["fc.bias"]


class TestResume:
    def checkpoint(self, strategy: StreamingStrategy | None = None, **options: Any) -> dict[str, Any]:
        log = Log()
        grid = KnownClients(federation(), **options)
        (strategy or FedStale()).start(grid, initial(), num_rounds=2, callbacks=[log])
        return log.reports[-1].checkpoint()

    def test_the_grids_state_comes_along(self) -> None:
        tree = self.checkpoint()
        grid, log = KnownClients(federation(), first_round=3), Log()
        FedStale().start(grid, initial(), num_rounds=3, resume_from=tree, callbacks=[log])
        assert grid.loaded == {"rounds": [1, 2]}
        assert log.events[0] == ("start", 3, 3)

    def test_of_another_strategy(self) -> None:
        with pytest.raises(CheckpointError, match="of strategy FedStale, this run uses FedAU"):
            FedAU().start(ScriptedGrid(federation()), initial(), resume_from=self.checkpoint())

    @pytest.mark.parametrize("change", ["size", "names", "dtype"])
    def test_of_another_model(self, change: str) -> None:
        other = initial(width=6) if change == "size" else initial()
        if change == "names":
            other = ArrayRecord({f"other.{name}": array for name, array in other.items()})
        if change == "dtype":
            other["scale"] = as_array(np.zeros((), np.float16))
        with pytest.raises(CheckpointError, match="of a model"):
            FedStale().start(ScriptedGrid(federation()), other, resume_from=self.checkpoint())

    def test_of_another_version(self) -> None:
        tree = self.checkpoint()
        del tree["strategy"]["state"]["stale"]
        with pytest.raises(CheckpointError, match="holds no 'stale' of FedStale: another version"):
            FedStale().start(ScriptedGrid(federation()), initial(), resume_from=tree)

    def test_of_another_kind_of_memory(self) -> None:
        with pytest.raises(CheckpointError, match="kind 'ram', this run has memory='fp16'"):
            FedStale(memory="fp16").start(
                ScriptedGrid(federation()), initial(), resume_from=self.checkpoint()
            )

    def test_not_of_a_run(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no entry 'strategy'"):
            FedStale().start(ScriptedGrid(federation()), initial(), resume_from={"round": 1})
        with pytest.raises(CheckpointError, match="No such file"):
            FedStale().start(ScriptedGrid(federation()), initial(), resume_from=tmp_path / "none")
        (tmp_path / "garbage").write_bytes(b"garbage" * 100)
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path / "garbage")


def echo(message: Message) -> Message:
    """A client that does no work: its model is what it received."""
    metrics = MetricRecord({keys.NUM_EXAMPLES: 1})
    return reply(RecordDict({keys.ARRAYS: message.content[keys.ARRAYS], keys.METRICS: metrics}), to=message)


class TestPrecisions:
    @pytest.mark.parametrize("kind", ["float16", "bfloat16"])
    @pytest.mark.parametrize("row", [r for r in ROWS if r.name in ("fedavg", "mifa", "feddyn")], ids=str)
    def test_clients_that_do_nothing_leave_the_servers_own_digits(self, row: Any, kind: str) -> None:
        # The server keeps float32; what it sends is rounded, and no update may contain that rounding.
        start = ArrayRecord()
        for name, array in initial(buffers=False).items():
            x = view(array)
            start[name] = as_bf16_array(x) if kind == "bfloat16" else as_array(x.astype(kind))
        strategy = row.strategy()
        strategy.start(ScriptedGrid({n: TinyStep(KEYS[i]) for i, n in enumerate(NODES)}), start, num_rounds=2)
        moved = strategy.x.copy()
        received = strategy.layout.flatten(strategy.arrays())
        assert np.abs(received - moved).max() > 0  # The server holds more digits than it sends.
        grid = ScriptedGrid(dict.fromkeys(NODES, echo))
        messages = strategy.configure_train(3, strategy.arrays(), ConfigRecord(), grid)
        if row.name == "fedavg":
            strategy.aggregate_train(3, grid.send_and_receive(messages))
            assert strategy.x.tobytes() == moved.tobytes()
        else:
            for message in grid.send_and_receive(messages):
                assert strategy._intake.open(message).peak == 0.0

    def test_float64_models_are_computed_in_float64(self) -> None:
        start = ArrayRecord({"w": as_array(np.zeros(50))})
        clients = federation()
        strategy = FedAvg(weighting="uniform")
        grid = ScriptedGrid(clients)
        strategy.start(grid, start, num_rounds=1)
        replies = [clients[m.metadata.dst_node_id](m) for m in grid.sent[0]]
        expected = np.mean([view(r.content["arrays"]["w"]) for r in replies], axis=0)  # type: ignore[union-attr]
        assert strategy.x.dtype == np.float64
        np.testing.assert_allclose(strategy.x, expected, rtol=0, atol=1e-16)


class TinyStep(SyntheticClient):
    """A client that moves a 16-bit model a little."""

    def __init__(self, key: int) -> None:
        super().__init__(key, number=abs(key) % 1000, scale=0.01)

    def content(self, message: Message) -> RecordDict:
        content = super().content(message)
        for name, array in message.content[keys.ARRAYS].items():
            if array.dtype == "bfloat16":
                noise = np.random.default_rng(self.number).standard_normal(array.shape)
                content[keys.ARRAYS][name] = as_bf16_array(np.asarray(view(array) + 0.01 * noise, np.float32))
        return content


class Noisy(Strategy):
    """A strategy around another, as Flower's differential privacy: it changes the model after each round."""

    def __init__(self, inner: StreamingStrategy) -> None:
        self.inner = inner

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any) -> Any:
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        arrays, metrics = self.inner.aggregate_train(server_round, replies)
        assert arrays is not None
        changed = ArrayRecord()
        for name, array in arrays.items():
            changed[name] = as_array(np.asarray(view(array) + 1, view(array).dtype))
        return changed, metrics

    def configure_evaluate(self, *args: Any) -> Any:
        return []

    def aggregate_evaluate(self, *args: Any) -> None:
        return None

    def summary(self) -> None:
        self.inner.summary()


def test_a_wrapping_strategys_change_of_the_model_is_not_lost() -> None:
    grid = ScriptedGrid(dict.fromkeys(NODES, echo), exchanges=2)
    result = Noisy(FedAvg()).start(grid, initial(), num_rounds=3)
    for name, array in initial().items():
        np.testing.assert_allclose(view(result.arrays[name]), view(array) + 3, rtol=1e-6)


def test_model_and_layout_are_asked_for_too_early() -> None:
    with pytest.raises(RuntimeError, match="no model yet"):
        _ = FedAvg().layout
