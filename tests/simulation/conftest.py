"""A ClientApp in a few lines of NumPy, and what the tests of `LocalGrid` do with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from turnout.simulation import LocalGrid
from turnout.wire import as_array, view
from turnout.wire.flower import request

Before = Callable[[int, Message], None]


def _train(message: Message, context: Context) -> Message:
    """Three noisy gradient steps on |x - c_i|^2, with momentum that the client keeps between rounds."""
    client = int(context.node_config["partition-id"])
    server_round = int(message.content["config"]["server-round"])
    noise = np.random.default_rng([client, server_round])
    x = view(message.content["arrays"]["x"]).astype(np.float64)
    state = context.state
    momentum = view(state["momentum"]["m"]).copy() if "momentum" in state else np.zeros_like(x)
    for _ in range(3):
        momentum = 0.9 * momentum + (x - client) + 0.1 * noise.standard_normal(x.shape)
        x = x - 0.05 * momentum
    calls = state["calls"]["count"] + 1 if "calls" in state else 1
    state["momentum"] = ArrayRecord({"m": as_array(momentum)})
    state["calls"] = MetricRecord({"count": calls})
    metrics = MetricRecord(
        {"num-examples": client + 1, "client-id": client, "train-loss": float(np.sum(x**2))}
    )
    arrays = ArrayRecord({"x": as_array(x.astype(np.float32))})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def _evaluate(message: Message, context: Context) -> Message:
    distance = float(np.linalg.norm(view(message.content["arrays"]["x"]) - context.node_id))
    return Message(
        RecordDict({"metrics": MetricRecord({"num-examples": 1, "distance": distance})}), reply_to=message
    )


@pytest.fixture
def make_app() -> Callable[..., ClientApp]:
    """Return a maker of ClientApps; ``before(client, message)`` runs first in each training call."""

    def make(before: Before = lambda client, message: None) -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            before(int(context.node_config["partition-id"]), message)
            return _train(message, context)

        app.evaluate()(_evaluate)
        return app

    return make


@pytest.fixture
def ask() -> Callable[..., list[Message]]:
    """Return a maker of one training message per node, all around the same records."""

    def make(
        nodes: Iterable[int], x: np.ndarray | None = None, server_round: int = 1, message_type: str = "train"
    ) -> list[Message]:
        vector = np.zeros(4, dtype=np.float32) if x is None else x
        content = RecordDict(
            {
                "arrays": ArrayRecord({"x": as_array(vector)}),
                "config": ConfigRecord({"server-round": server_round}),
            }
        )
        return [request(content, dst_node_id=node, message_type=message_type) for node in nodes]

    return make


@pytest.fixture
def federate(ask: Callable[..., list[Message]]) -> Callable[..., np.ndarray]:
    """Return a run of plain averaging over rounds ``first`` to ``last``, in the order of client numbers."""

    def run(grid: LocalGrid, first: int, last: int, x: np.ndarray | None = None) -> np.ndarray:
        vector = np.zeros(4, dtype=np.float32) if x is None else x
        for server_round in range(first, last + 1):
            grid.start_round(server_round)
            replies = grid.send_and_receive(ask(grid.get_node_ids(), vector, server_round))
            models = {r.metadata.src_node_id: view(r.content["arrays"]["x"]) for r in replies}
            if models:
                vector = np.mean([models[node] for node in sorted(models)], axis=0, dtype=np.float32)
        return vector

    return run
