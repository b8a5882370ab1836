"""What stock strategies keep is what checkpoints hold, and what they compute is what Flower computes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import Strategy
from surface import STRATEGIES

from turnout.simulation import LocalGrid
from turnout.strategies import StockStrategy
from turnout.strategies.stock_names import make_stock
from turnout.strategies.stock_state import KEPT, PASSING
from turnout.wire import ConfigError, as_array, view

N, SIZE = 7, 50
OPTIONS: dict[str, dict[str, Any]] = {
    "FedAvgM": {"server_momentum": 0.9, "server_learning_rate": 0.5},
    "FedProx": {"proximal_mu": 0.1},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "Bulyan": {"num_malicious_nodes": 1},
    "QFedAvg": {"client_learning_rate": 0.1, "q": 0.5},
    "DifferentialPrivacyServerSideFixedClipping": {"noise_multiplier": 0.5, "clipping_norm": 1.0},
    "DifferentialPrivacyServerSideAdaptiveClipping": {"noise_multiplier": 0.1},
    "DifferentialPrivacyClientSideFixedClipping": {"noise_multiplier": 0.5, "clipping_norm": 1.0},
    "DifferentialPrivacyClientSideAdaptiveClipping": {"noise_multiplier": 0.1},
}
# Set anew in every round, from the model at hand.
MODEL_AT_HAND = "current_arrays"


def stock(name: str) -> Strategy:
    options = OPTIONS.get(name, {})
    if name.startswith("DifferentialPrivacy"):
        options = {
            **options,
            "num_sampled_clients": N,
            "strategy": "FedAdam" if "Server" in name else "FedAvg",
        }
    return make_stock(name, options)


def app(name: str = "") -> ClientApp:
    mods = {"ClientSideFixed": fixedclipping_mod, "ClientSideAdaptive": adaptiveclipping_mod}
    made = ClientApp(mods=[mod for part, mod in mods.items() if part in name])

    @made.train()
    def train(message: Message, context: Context) -> Message:
        client, config = int(context.node_config["partition-id"]), message.content["config"]
        rng = np.random.default_rng([client, config["server-round"]])
        arrays = ArrayRecord()
        for key, array in message.content["arrays"].items():
            value = view(array)
            step = rng.standard_normal(value.shape) if value.dtype.kind == "f" else np.ones(value.shape)
            arrays[key] = as_array(np.asarray(value + step, value.dtype))
        metrics = MetricRecord({"num-examples": 1 + client, "client-id": client, "train-loss": 1.0 + client})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return made


def initial(name: str = "") -> ArrayRecord:
    rng = np.random.default_rng(0)
    # Names in an order that sorting would change.
    arrays = {
        "w": as_array(rng.standard_normal((SIZE, 2)).astype(np.float32)),
        "b": as_array(np.zeros(SIZE, np.float32)),
    }
    return ArrayRecord(arrays | ({"steps": as_array(np.array(3))} if name != "QFedAvg" else {}))


def started(strategy: StockStrategy, name: str, rounds: int, **more: Any) -> ArrayRecord:
    arrays = strategy.start(LocalGrid(app(name), N), initial(name), num_rounds=rounds, **more).arrays
    assert [report.outcome for report in strategy.reports] == ["ok"] * N
    return arrays


def parts(strategy: Any) -> list[Any]:
    found = [strategy]
    while isinstance(inner := getattr(found[-1], "strategy", None), Strategy):
        found.append(inner)
    return found


def frozen(strategy: Strategy) -> list[dict[str, str]]:
    return [{key: repr(value) for key, value in vars(part).items()} for part in parts(strategy)]


@pytest.mark.parametrize("name", STRATEGIES)
def test_nothing_is_kept_that_a_checkpoint_lacks(name: str) -> None:
    strategy = stock(name)
    before = frozen(strategy)
    started(StockStrategy(stock=strategy), name, 2)
    for old, new in zip(before, frozen(strategy), strict=True):
        changed = {key for key in new if key != "strategy" and old.get(key) != new[key]}
        assert changed <= {*KEPT, *PASSING}, f"{name} also keeps {changed - {*KEPT, *PASSING}}"


@pytest.mark.parametrize("name", STRATEGIES)
def test_resumed_equals_undisturbed(name: str) -> None:
    from turnout.strategies import Callback, RoundReport

    class Keep(Callback):
        tree: dict[str, Any]

        def on_round_end(self, report: RoundReport) -> None:
            if report.server_round == 2:
                self.tree = report.checkpoint()

    keep = Keep()
    whole = started(StockStrategy(stock=stock(name), seed=5), name, 4, callbacks=[keep])
    resumed = started(StockStrategy(stock=stock(name), seed=5), name, 4, resume_from=keep.tree)
    for key, array in whole.items():
        np.testing.assert_array_equal(view(array), view(resumed[key]))
        assert array.dtype == initial(name)[key].dtype


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_model_is_the_one_that_flower_computes(name: str) -> None:
    """One round of Flower's own loop, from the same draws."""
    wrapped = started(StockStrategy(stock=stock(name), seed=5), name, 1)
    first = [int(word) for word in np.random.SeedSequence([5, 1, 1]).generate_state(2)]
    last = [int(word) for word in np.random.SeedSequence([5, 1, 3]).generate_state(2)]
    strategy = stock(name)
    random.seed(first[0])
    grid = LocalGrid(app(name), N)
    messages = list(strategy.configure_train(1, initial(name), _config(), grid))
    replies = list(grid.send_and_receive(messages))
    np.random.seed(last[1])
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    for key, array in wrapped.items():
        expected = view(arrays[key])
        if array.dtype.startswith("int"):
            expected = np.rint(expected)
        np.testing.assert_array_equal(view(array), expected.astype(array.dtype))
    assert np.any(view(wrapped["w"]) != view(initial()["w"]))


def test_an_integer_is_refused_where_flower_cannot_average_it() -> None:
    with pytest.raises(ConfigError, match=r"QFedAvg.*'steps'"):
        StockStrategy(stock=stock("QFedAvg")).start(LocalGrid(app(), N), initial(), num_rounds=1)


def _config() -> Any:
    from flwr.app import ConfigRecord

    return ConfigRecord()
