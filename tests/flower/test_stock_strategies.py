"""Flower's strategies and mods by name in an experiment: checked, seeded, recorded, resumed, hard to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Krum

from turnout.experiment import Experiment
from turnout.server import RunStore
from turnout.simulation import Bernoulli, LocalGrid
from turnout.simulation.run import simulate
from turnout.strategies import FedAU, StockStrategy
from turnout.wire import CheckpointError, ConfigError, as_array, view

N = 5
SMALL: dict[str, Any] = {
    "task": {"name": "digits", "model": "softmax", "num_clients": N},
    "client": {"local_steps": 2, "lr": 0.1},
}


def experiment(place: Path, strategy: dict[str, Any], rounds: int = 3, **sections: Any) -> Experiment:
    run = {"rounds": rounds, "seed": 2, "directory": str(place)}
    return Experiment.from_dict({**SMALL, "run": run, "strategy": strategy, **sections})


def app(reply: Callable[[int, np.ndarray], Any] | None = None, **metrics: Any) -> ClientApp:
    """Clients that send the model plus their number; ``reply`` makes another vector of it."""
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        vector = view(message.content["arrays"]["w"]) + np.float32(client)
        sent = ArrayRecord({"w": as_array(np.asarray(vector if reply is None else reply(client, vector)))})
        numbers = {
            "num-examples": 1,
            "client-id": client,
            "train-loss": 1.0,
            **metrics.get(f"of{client}", {}),
        }
        return Message(RecordDict({"arrays": sent, "metrics": MetricRecord(numbers)}), reply_to=message)

    @made.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        return Message(
            RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": float(client)})}),
            reply_to=message,
        )

    return made


def initial() -> ArrayRecord:
    return ArrayRecord({"w": as_array(np.zeros(4, np.float32))})


def test_an_interrupted_run_ends_with_the_same_model(tmp_path: Path) -> None:
    strategy = {"name": "flwr:FedAdam", "eta": 0.05}
    participation = {"model": "bernoulli", "probabilities": 0.8}
    whole = simulate(experiment(tmp_path, strategy, 4, participation=participation), plots=False)
    simulate(experiment(tmp_path, strategy, 2, participation=participation), plots=False)
    rest = simulate(
        experiment(tmp_path, strategy, 4, participation=participation), resume="last", plots=False
    )
    assert rest.model_sha256 == whole.model_sha256
    with RunStore(tmp_path) as store:
        run = store.run("last")
        assert (run.strategy, run.status, len(store.rounds(run.id))) == ("flwr:FedAdam", "finished", 4)
        assert {row.outcome for row in store.client_rows(run.id)} == {"ok"}
        assert store.latest_metrics(run.id)["accuracy"] > 0.2
    assert ":" not in rest.directory.name


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ({"name": "flwr:FedAdan"}, "flwr:FedAdam"),
        ({"name": "flwr:FedAdam", "etta": 1.0}, "eta"),
        ({"name": "flwr:FedAdam", "eta": "fast"}, "strategy.eta"),
        ({"name": "flwr:FedAvg", "weighted_by_key": "n"}, "weighted_by_key"),
        ({"name": "flwr:FedTrimmedAvg", "beta": "x"}, "beta"),
        ({"name": "flwr:DifferentialPrivacyServerSideFixedClipping"}, "noise_multiplier"),
        (
            {
                "name": "flwr:DifferentialPrivacyServerSideFixedClipping",
                "noise_multiplier": 1.0,
                "clipping_norm": -1.0,
                "num_sampled_clients": 5,
            },
            "clipping norm should be a positive",
        ),
        (
            {
                "name": "flwr:DifferentialPrivacyServerSideAdaptiveClipping",
                "noise_multiplier": 0.0,
                "num_sampled_clients": 5,
                "strategy": {"name": "FedAdam", "etta": 1.0},
            },
            "eta",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_options_are_refused_by_name(strategy: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        experiment(tmp_path, strategy)


def test_what_only_our_strategies_do_is_refused(tmp_path: Path) -> None:
    fedadam = {"name": "flwr:FedAdam"}
    client = {"optimizer": "adam", "optimizer_state": "send", "local_steps": 1}
    sending = experiment(tmp_path, fedadam, client=client)
    with pytest.raises(ConfigError, match=r"flwr:FedAdam averages nothing but the model.*optimizer_state"):
        simulate(sending, plots=False)
    exact = experiment(tmp_path, fedadam, peft={"name": "lora", "r": 2, "aggregation": "exact-svd"})
    with pytest.raises(ConfigError, match="exact-svd"):
        simulate(exact, plots=False)


def test_adapters_are_averaged_by_stock_strategies(tmp_path: Path) -> None:
    chosen = experiment(tmp_path, {"name": "flwr:FedAdam", "eta": 0.01}, peft={"name": "lora", "r": 2})
    summary = simulate(chosen, plots=False)
    with RunStore(tmp_path) as store:
        assert {row.outcome for row in store.client_rows(summary.run_id)} == {"ok"}


def test_variants_compare_stock_strategies_with_ours(tmp_path: Path) -> None:
    ours = experiment(
        tmp_path, {"name": "fedau"}, strategies={"gentle": {"name": "flwr:FedAdam", "eta": 0.01}}
    )
    assert ours.variant("gentle").strategy.options["eta"] == 0.01
    assert ours.variant("flwr:FedMedian").strategy.name == "flwr:FedMedian"
    with pytest.raises(ConfigError, match=r"flwr:Krum"):
        ours.variant("flwr:Krumm")


@pytest.mark.parametrize("make", [FedAvg, FedAdam, FedMedian, lambda: Krum(num_malicious_nodes=1)])
@pytest.mark.parametrize(
    "bad",
    [
        lambda client, vector: vector * np.nan if client == 3 else vector,
        lambda client, vector: vector[:2] if client == 3 else vector,
        lambda client, vector: 1 / 0 if client == 3 else vector,
    ],
    ids=["nan", "shape", "raises"],
)
def test_a_bad_reply_is_refused_and_the_others_count(make: Any, bad: Any) -> None:
    strategy = StockStrategy(stock=make())
    strategy.start(LocalGrid(app(bad), N), initial(), num_rounds=2)
    outcomes = {report.client: report.outcome for report in strategy.reports}
    assert outcomes.pop(3) in ("rejected", "failed")
    assert set(outcomes.values()) == {"ok"}
    good = StockStrategy(stock=make())
    good.start(LocalGrid(app(), N, participation=_without_3()), initial(), num_rounds=2)
    np.testing.assert_array_equal(strategy.x, good.x)


def _without_3() -> Any:
    return Bernoulli([1.0, 1.0, 1.0, 0.0, 1.0], seed=0, allow_zero=True)


def test_a_metric_of_its_own_does_not_end_the_run() -> None:
    """Flower raises when the replies' metrics have different names."""
    strategy = StockStrategy(stock=FedAvg())
    strategy.start(LocalGrid(app(of3={"surprise": 1.0}), N), initial(), num_rounds=1)
    assert {report.outcome for report in strategy.reports} == {"ok"}
    np.testing.assert_array_equal(strategy.x, np.full(4, 2.0, np.float32))


def test_an_update_that_is_too_long_is_refused() -> None:
    strategy = StockStrategy(stock=FedAvg(), max_update_norm=5.0)
    strategy.start(LocalGrid(app(), N), initial(), num_rounds=1)  # Lengths 0, 2, 4, 6, 8.
    assert [report.outcome for report in strategy.reports].count("ok") == 3
    np.testing.assert_array_equal(strategy.x, np.ones(4, np.float32))


def test_rounds_with_too_few_clients_pass_unused() -> None:
    participation = Bernoulli([0.3] * N, seed=1)
    asked: list[int] = []

    class Grid(LocalGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            requests = list(messages)
            asked.append(len(requests))
            return super().send_and_receive(requests, timeout=timeout)

    strategy = StockStrategy(stock=FedAvg(min_available_nodes=2, fraction_evaluate=0.0))
    strategy.start(Grid(app(), N, participation=participation), initial(), num_rounds=12)
    present = [int(participation.mask(r).sum()) for r in range(1, 13)]
    assert asked == [count if count >= 2 else 0 for count in present]
    assert min(present) < 2 <= max(present)


def test_clients_are_sampled_by_the_seed() -> None:
    def cohorts(seed: int) -> list[set[int]]:
        from turnout.strategies import Callback, RoundReport

        class Note(Callback):
            seen: list[set[int]]

            def on_start(self, strategy: Any, *, num_rounds: int, first_round: int) -> None:
                self.seen = []

            def on_round_end(self, report: RoundReport) -> None:
                self.seen.append({client.client for client in report.clients})

        note = Note()
        stock = StockStrategy(stock=FedAvg(fraction_train=0.4), seed=seed)
        stock.start(LocalGrid(app(), N), initial(), num_rounds=6, callbacks=[note])
        return note.seen

    assert cohorts(1) == cohorts(1) != cohorts(2)
    assert all(len(cohort) == 2 for cohort in cohorts(1))


def test_clients_evaluate_if_the_strategy_asks_them() -> None:
    result = StockStrategy(stock=FedAvg()).start(LocalGrid(app(), N), initial(), num_rounds=2)
    assert {r: dict(m) for r, m in result.evaluate_metrics_clientapp.items()} == {
        1: {"loss": 2.0},
        2: {"loss": 2.0},
    }
    quiet = StockStrategy(stock=FedAvg(fraction_evaluate=0.0)).start(
        LocalGrid(app(), N), initial(), num_rounds=1
    )
    assert not quiet.evaluate_metrics_clientapp


def test_checkpoints_are_of_one_stock_strategy() -> None:
    one = StockStrategy(stock=FedAdam())
    one.start(LocalGrid(app(), N), initial(), num_rounds=1)
    tree = {"round": 1, "strategy": one.state_dict()}
    with pytest.raises(CheckpointError, match=r"'FedAdam'.*'FedMedian'"):
        StockStrategy(stock=FedMedian()).start(LocalGrid(app(), N), initial(), num_rounds=2, resume_from=tree)
    with pytest.raises(ConfigError, match="Turnout's own run by themselves"):
        StockStrategy(stock=FedAU())
    assert one.memory_bytes() == 2 * 4 * 4  # Two moments of four numbers.


def test_the_global_generators_are_put_back() -> None:
    import random

    random.seed(5)
    np.random.seed(5)
    expected = (random.getstate(), np.random.get_state()[1].tolist())
    StockStrategy(stock=FedAvg(fraction_train=0.5)).start(LocalGrid(app(), N), initial(), num_rounds=2)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == expected


def test_local_privacy_is_seeded_and_the_same_on_every_executor(tmp_path: Path) -> None:
    def final(executor: str = "serial", **more: Any) -> str:
        link = {
            "name": "flwr:LocalDpMod",
            "clipping_norm": 0.5,
            "sensitivity": 0.5,
            "delta": 1e-3,
            "epsilon": 50.0,
        }
        sections = {"link": link | more, "simulation": {"executor": executor}}
        return simulate(
            experiment(tmp_path, {"name": "flwr:FedAvg"}, 2, **sections), plots=False
        ).model_sha256

    once = final()
    assert final("threads") == once
    assert final(seed=9) != once
    assert final(epsilon=5.0) != once


def test_impossible_privacy_is_refused(tmp_path: Path) -> None:
    for wrong, said in [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": 1.0, "clipping_norm": -1.0}, "clipping_norm"),
    ]:
        link = {"name": "flwr:LocalDpMod", "clipping_norm": 1.0, "sensitivity": 1.0, "delta": 0.1, **wrong}
        with pytest.raises(ConfigError, match=said):
            experiment(tmp_path, {"name": "flwr:FedAvg"}, link=link)


def test_clients_clip_when_the_server_says_so(tmp_path: Path) -> None:
    strategy = {
        "name": "flwr:DifferentialPrivacyClientSideAdaptiveClipping",
        "noise_multiplier": 0.0,
        "num_sampled_clients": N,
        "initial_clipping_norm": 1e-3,
    }
    chosen = experiment(tmp_path, strategy, link={"name": "flwr:adaptiveclipping_mod"})
    simulate(chosen, plots=False)
    with RunStore(tmp_path) as store:
        run = store.run("last")
        norms = [row.update_norm for row in store.client_rows(run.id) if row.round == 1]
        adapted = [m.value for m in store.metrics(run.id, "diagnostics") if m.name == "clipping-norm"]
    assert len(norms) == N
    assert max(norms) <= 1e-3 * (1 + 1e-5)
    assert len(adapted) == 3
    # Every update was longer. The paper's norm then grows; that of flwr 1.41, which counts the clipped where
    # the paper counts the others, shrinks.
    np.testing.assert_allclose(adapted, 1e-3 * np.exp(-0.2 * 0.5 * np.arange(1, 4)))
    unclipped = experiment(tmp_path, strategy)
    with RunStore(tmp_path) as store:
        simulate(unclipped, plots=False)
        run = store.run("last")
        assert {row.outcome for row in store.client_rows(run.id)} == {
            "rejected"
        }  # No norm_bit in the replies.


THEIR_APP = """
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

clients = ClientApp()
not_an_app = 3

@clients.train()
def train(message, context):
    metrics = MetricRecord({"num-examples": 1, "client-id": context.node_config["partition-id"]})
    return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)
"""


def test_an_app_of_its_own_is_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.numpy import save_file

    monkeypatch.chdir(tmp_path)
    save_file({"w": np.zeros(4, np.float32)}, "initial.safetensors")
    Path("their_app.py").write_text(THEIR_APP)
    task = {"name": "external", "model": "initial.safetensors", "num_clients": N, "app": "their_app:clients"}
    chosen = experiment(tmp_path, {"name": "flwr:FedMedian"}, task=task, client={})
    summary = simulate(chosen, plots=False)
    assert (summary.rounds, summary.metrics) == (3, {})
    for wrong, said in [("their_app:not_an_app", "must be a Flower ClientApp"), ("no_such:app", "no module")]:
        with pytest.raises(ConfigError, match=said):
            simulate(experiment(tmp_path, {"name": "fedavg"}, task={**task, "app": wrong}, client={}))


def test_messages_cannot_be_sent_behind_the_engine() -> None:
    class Chatty(FedAvg):
        def configure_train(self, server_round: int, arrays: Any, config: ConfigRecord, grid: Any) -> Any:
            grid.send_and_receive([])
            return super().configure_train(server_round, arrays, config, grid)

    with pytest.raises(ConfigError, match="sends messages by itself"):
        StockStrategy(stock=Chatty()).start(LocalGrid(app(), N), initial(), num_rounds=1)
