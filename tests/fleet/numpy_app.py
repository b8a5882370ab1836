"""A deterministic ClientApp without torch, and a node process that runs it: ``ADDRESS CLIENTS ...``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from turnout.wire import as_array, view


def make_app(size_delay: float = 0.0, *, seed: int = 0, fail: int = -1, stateful: bool = True) -> ClientApp:
    """Each client adds its own seeded noise to the model, and counts its rounds in its state."""
    app = ClientApp()
    jitter = np.random.default_rng(os.getpid())

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if size_delay:
            time.sleep(float(jitter.uniform(0, size_delay)))
        client = int(context.node_config["partition-id"])
        server_round = int(message.content["config"]["server-round"])
        if client == fail:
            raise ValueError("planned failure")
        rng = np.random.default_rng([seed, client, server_round])
        count = 0.0
        if "count" in context.state:
            count = float(context.state["count"]["n"])
        if stateful:
            context.state["count"] = MetricRecord({"n": count + 1})
        arrays = ArrayRecord()
        for name, array in message.content["arrays"].items():
            value = view(array)
            # A heavy-tailed step that also depends on the state, so that a state applied twice shows.
            step = rng.standard_normal(value.shape).astype(value.dtype) * np.float32(0.1 + count)
            arrays[name] = as_array(value + step if value.dtype.kind == "f" else value + 1)
        metrics = {"num-examples": 1 + client % 5, "client-id": client, "train-loss": 1.0 / server_round}
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        metrics = {"num-examples": 1 + client % 5, "loss": float(client)}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    return app


def echo_app() -> ClientApp:
    """Reply the received model itself: no work, for measuring what is around it."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1, "client-id": int(context.node_config["partition-id"])})
        return Message(
            RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message
        )

    return app


def main() -> None:
    from turnout.client.node import ClientTls, parse_clients, run_node

    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("clients")
    parser.add_argument("--name", default="node")
    parser.add_argument("--state-dir")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--fail", type=int, default=-1)
    parser.add_argument("--max-rounds", type=int)
    parser.add_argument("--echo", action="store_true")
    parser.add_argument("--tls", nargs="+")
    options = parser.parse_args()
    logging.basicConfig(level=os.environ.get("LEVEL", "WARNING"))
    app = echo_app() if options.echo else make_app(options.delay, fail=options.fail)
    summary = run_node(
        options.address,
        app,
        parse_clients(options.clients),
        name=options.name,
        state_dir=options.state_dir,
        workers=options.workers,
        max_rounds=options.max_rounds,
        tls=ClientTls(*options.tls) if options.tls else None,
    )
    print(json.dumps({"rounds": summary.rounds, "replies": summary.replies, "sessions": summary.sessions,
                      "reason": summary.reason}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
