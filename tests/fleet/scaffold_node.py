"""Deterministic stateful clients without torch, for SCAFFOLD: ``ADDRESS CLIENTS NAME STATE PAUSE``.

Its clients keep a SCAFFOLD control variate: a state that is lost, or applied twice, changes the model.
While there is a file STATE/hold they stay in their training, and say so in STATE/training.
"""

from __future__ import annotations

import logging
import random
import sys
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from turnout.wire import as_array, view


def app(pause: float, hold: Path | None = None) -> ClientApp:
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        time.sleep(random.uniform(0, pause))
        while hold is not None and hold.exists():
            hold.with_name("training").touch()
            time.sleep(0.01)
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


class Acknowledged(logging.Handler):
    """Keeps in a file, which outlives the process, what clients were told to count: ``CLIENT ROUND``."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.DEBUG)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).endswith("the reply counts"):
            self._file.write("{} {}\n".format(*record.args))


if __name__ == "__main__":
    import ctypes
    import os

    from turnout.client.node import parse_clients, run_node

    logging.basicConfig(level=os.environ.get("LEVEL", "ERROR"))
    address, clients, name, state_dir, pause = sys.argv[1:]
    nodes_log = logging.getLogger("turnout.client.node")
    nodes_log.setLevel(logging.DEBUG)
    nodes_log.addHandler(Acknowledged(Path(state_dir) / "acknowledged.txt"))
    logging.getLogger().handlers[0].setLevel(os.environ.get("LEVEL", "ERROR"))
    if fault := os.environ.get("FAULT_AT"):  # Kill this process before its N-th durable step.
        ctypes.CDLL(None).fault_arm(*(ctypes.c_long(number) for number in (7, int(fault), 0, 0)))
    made = app(float(pause), Path(state_dir) / "hold")
    run_node(address, made, parse_clients(clients), name=name, state_dir=state_dir, workers=2,
             insecure=True, backoff=0.02, max_backoff=0.06)  # fmt: skip
