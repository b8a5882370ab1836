"""Deterministic stateful clients without torch, for SCAFFOLD: ``ADDRESS CLIENTS NAME STATE PAUSE``."""

from __future__ import annotations

import random
import sys
import time

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from turnout.wire import as_array, view


def app(pause: float) -> ClientApp:
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        time.sleep(random.uniform(0, pause))
        client = int(context.node_config["partition-id"])
        server_round = int(message.content["config"]["server-round"])
        x = view(message.content["arrays"]["w"])
        shared = view(message.content["control"]["w"])
        own = view(context.state["own"]["w"]) if "own" in context.state else np.zeros_like(x)
        target = np.random.default_rng([client, server_round]).standard_normal(x.shape).astype(x.dtype)
        y = x - np.float32(0.3) * (x - target - own + shared)
        new = own - shared + (x - y)
        context.state["own"] = ArrayRecord({"w": as_array(new)})
        content = RecordDict({"arrays": ArrayRecord({"w": as_array(y)})})
        content["control"] = ArrayRecord({"w": as_array(new - own)})
        content["metrics"] = MetricRecord({"num-examples": client + 1, "client-id": client})
        return Message(content, reply_to=message)

    return made


if __name__ == "__main__":
    from turnout.client.node import parse_clients, run_node

    address, clients, name, state_dir, pause = sys.argv[1:]
    run_node(address, app(float(pause)), parse_clients(clients), name=name, state_dir=state_dir, workers=2,
             max_backoff=1.0)  # fmt: skip
