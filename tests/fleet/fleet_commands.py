"""``turnout`` commands as real processes, and the small experiments that they run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turnout.experiment import load_experiment
from turnout.experiment.recorded import RunSummary
from turnout.server import model_sha256
from turnout.simulation import LocalGrid
from turnout.simulation.run import simulate
from turnout.strategies import FedAvg
from turnout.wire.model_file import read_model

PATIENCE = 90.0
EXPERIMENT = """
[run]
name = "small"
rounds = 3

[task]
name = "digits"
model = "softmax"
num_clients = 6
partition = "label-mix"
min_examples = 1

[client]
lr = 0.1
batch_size = 16
local_steps = 2

[strategy]
name = "fedavg"

[participation]
model = "bernoulli"
probabilities = { kind = "label-correlated", mean = 0.6, minimum = 0.3, alpha = 0.5 }
"""
OWN_APP = """
import time
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from turnout.wire import as_array, view

app = ClientApp()
text = "no app"

@app.train()
def train(message, context):
    time.sleep(float(open("pause").read()))
    client = int(context.node_config["partition-id"])
    count = context.state["count"]["n"] if "count" in context.state else 0.0
    context.state["count"] = MetricRecord({"n": count + 1})
    rng = np.random.default_rng([client, int(message.content["config"]["server-round"])])
    arrays = ArrayRecord()
    for name, array in message.content["arrays"].items():
        value = view(array)
        step = rng.standard_normal(value.shape).astype(value.dtype)
        arrays[name] = as_array(value + step * np.float32(1 + count))
    metrics = MetricRecord({"num-examples": 1 + client, "client-id": client})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
"""
OWN = """
[run]
rounds = 6
[task]
name = "external"
model = "initial.safetensors"
num_clients = 2
"""


def free_port() -> int:
    """Return a port that no outgoing connection gets by chance, as nodes that try again and again would."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000)))
            return int(probe.getsockname()[1])


class Command:
    """A running ``turnout`` command."""

    def __init__(self, place: Path, name: str, arguments: list[str]) -> None:
        self.errors = place / f"{name}.err"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "turnout.cli", *arguments],
                cwd=place,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "COLUMNS": "200"},
            )

    def said(self) -> str:
        return self.errors.read_text()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while text not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, f"no {text!r} in: {self.said()}"
            time.sleep(0.02)

    def end(self, code: int = 0) -> dict[str, Any]:
        """Wait for the end; return the last line of JSON (empty without one)."""
        out, _ = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == code, self.said()
        return json.loads(out.splitlines()[-1]) if out.strip() else {}

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


Turnout = Callable[..., Command]


def simulated(place: Path, *overrides: str) -> RunSummary:
    """Run small.toml in this process: without a fork, since gRPC has threads here."""
    always = [f"run.directory={place / 'simulated'}", "simulation.executor=serial"]
    return simulate(load_experiment(place / "small.toml", [*always, *overrides]), plots=False)


def own(place: Path, pause: float) -> None:
    """Write an experiment whose clients bring a NumPy app, and their app."""
    import numpy as np
    from safetensors.numpy import save_file

    save_file(
        {"w": np.zeros(50, np.float32), "a": np.ones((2, 3), np.float32)}, place / "initial.safetensors"
    )
    (place / "own.toml").write_text(OWN)
    (place / "own_app.py").write_text(OWN_APP)
    (place / "pause").write_text(str(pause))


def undisturbed(place: Path) -> str:
    """Return the digest of the model that the own app's clients end with, run in this process."""
    app = runpy.run_path(str(place / "own_app.py"))["app"]
    grid = LocalGrid(app, 2, seed=0)
    result = FedAvg(seed=0).start(grid, read_model(place / "initial.safetensors"), num_rounds=6)
    return model_sha256(result.arrays)


def start_own(turnout: Turnout, address: str, *more: object) -> Command:
    return turnout("server", *more, "--address", address, "--json", "--no-plots")


def own_nodes(turnout: Turnout, address: str) -> list[Command]:
    shared = ("client", "--server", address, "--app", "own_app:app", "--json", "--clients")
    return [turnout(*shared, client) for client in (0, 1)]
