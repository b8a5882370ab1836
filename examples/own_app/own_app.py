"""A Flower ClientApp of your own, with a model and data that Turnout knows nothing of: no PyTorch needed.

    cd examples/own_app
    python own_app.py                                                       # writes initial.safetensors
    turnout server own_app.toml
    turnout client --server 127.0.0.1:9091 --app own_app:app --clients 0
    turnout client --server 127.0.0.1:9091 --app own_app:app --clients 1

Each client has 200 measurements of one line, ``y = 3 x - 1`` with noise, and fits it by gradient descent.
"""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def measurements(client: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what this client has measured: x and y, shape (200,); clients measure in different places."""
    rng = np.random.default_rng(client)
    x = rng.uniform(-1, 1, 200) + (0.5 if client % 2 else -0.5)
    return x, 3.0 * x - 1.0 + rng.normal(0, 0.1, 200)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Take twenty gradient steps from the model received, and reply the model with two metrics."""
    client = int(context.node_config["partition-id"])
    slope, offset = message.content["arrays"]["line"].numpy()
    x, y = measurements(client)
    for _ in range(20):
        error = slope * x + offset - y
        slope, offset = slope - 0.1 * np.mean(error * x), offset - 0.1 * np.mean(error)
    arrays = ArrayRecord({"line": Array(np.array([slope, offset], np.float32))})
    loss = float(np.mean((slope * x + offset - y) ** 2))
    metrics = MetricRecord({"num-examples": len(x), "client-id": client, "train-loss": loss})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


if __name__ == "__main__":
    from safetensors.numpy import save_file

    save_file({"line": np.zeros(2, np.float32)}, "initial.safetensors")
    print("wrote initial.safetensors")
