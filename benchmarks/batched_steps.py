"""How many clients a second one thread trains: the batched trainer beside training one client at a time.

    python benchmarks/batched_steps.py [--seconds 4] [--only mlp-64 cnn]

Rivals, all with the same data, model, batch size and epochs, on one PyTorch thread:

* ``tight``: the least that training one client at a time takes: flat parameters, autograd, a fresh
  permutation, ``add_``; no DataLoader, no messages, no state;
* ``tight-nhwc``: the same with images and convolutions in channels-last layout;
* ``serial``: `turnout.client.app.Trainer`, which also reads a message and writes a reply;
* ``batched``: `turnout.client.batched.BatchedTrainer`.

They run in turns, so that a change of the machine's speed meets all of them, and are timed by the CPU time
of this process, so that others on the machine matter less. Prints one JSON line for each workload: client
updates a second (the median turn) and the median ratio of the batched trainer to each of the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from turnout.client import ClientState, FlatModel, TrainOptions
from turnout.client.app import Trainer
from turnout.client.batched import BatchedTrainer, CohortWork
from turnout.tasks import ClassificationTask, ClientData, Examples, Iid
from turnout.tasks.models import image_model
from turnout.wire import keys
from turnout.wire.flower import new_context, request


def perceptron(side: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(side * side, 128), nn.ReLU(), nn.Linear(128, classes))


def wide_cnn(side: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (side // 4) ** 2, classes),
    )


@dataclass(frozen=True)
class Workload:
    """Clients hold between half and one and a half times ``examples`` images of ``side`` x ``side``."""

    name: str
    build: Callable[[int, int], nn.Module]
    side: int
    examples: int
    batch_size: int
    epochs: int
    clients: int


WORKLOADS = (
    Workload("softmax", lambda s, c: image_model("softmax", s, c), 8, 60, 20, 1, 256),
    Workload("mlp-64", lambda s, c: image_model("mlp", s, c), 8, 60, 20, 1, 256),
    Workload("mlp-64-full-batch", lambda s, c: image_model("mlp", s, c), 8, 60, 1000, 5, 256),
    Workload("mlp-128", perceptron, 28, 100, 20, 1, 32),
    Workload("mlp-128-two-epochs", perceptron, 28, 100, 20, 2, 32),
    Workload("cnn-8x8", lambda s, c: image_model("cnn", s, c), 8, 60, 20, 1, 64),
    Workload("cnn", lambda s, c: image_model("cnn", s, c), 28, 100, 20, 1, 8),
    Workload("cnn-wide", wide_cnn, 28, 100, 20, 1, 4),
    Workload("lenet", lambda s, c: image_model("lenet", s, c), 28, 100, 20, 1, 8),
)


class Images(ClassificationTask):
    """Random images and labels: only their number matters here."""

    name = "images"

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        rng = np.random.default_rng(0)
        self.sizes = rng.integers(workload.examples // 2, workload.examples * 3 // 2, workload.clients)
        total, side = int(self.sizes.sum()), workload.side
        examples = Examples(
            rng.standard_normal((total, 1, side, side), dtype=np.float32), rng.integers(0, 10, total)
        )
        super().__init__(
            examples, examples, num_clients=workload.clients, partition=Iid(), seed=0, partition_options={}
        )
        stops = np.cumsum(self.sizes)
        for client, (stop, size) in enumerate(zip(stops, self.sizes, strict=True)):
            rows = np.arange(stop - size, stop)
            self._clients[client] = ClientData(
                self.features(examples.x[rows]), torch.from_numpy(examples.labels[rows])
            )

    def model(self) -> nn.Module:
        return self.workload.build(self.workload.side, self.classes)


def tight(task: Images, *, channels_last: bool) -> Callable[[], None]:
    """Return what trains every client once, with nothing that the mathematics does not need."""
    workload, lr = task.workload, 0.1
    model = FlatModel(task.seeded_model(0))
    start = model.parameters.clone()
    data = [task.client_data(client) for client in range(task.num_clients)]
    trained = np.empty((len(data), model.size), np.float32)

    def forward(x: Tensor) -> Tensor:
        return model.module(x)

    if channels_last:
        # Each layer's own layout is what counts: a one-channel image looks the same in both.
        layers = list(model.module)

        def forward(x: Tensor) -> Tensor:
            for layer in layers:
                if isinstance(layer, nn.Conv2d):
                    weight = layer.weight.contiguous(memory_format=torch.channels_last)
                    x = x.to(memory_format=torch.channels_last)
                    x = torch.conv2d(x, weight, layer.bias, padding=layer.padding)
                    x = x.contiguous(memory_format=torch.channels_last)
                else:
                    x = layer(x)
            return x

    def run() -> None:
        for client, d in enumerate(data):
            model.parameters.copy_(start)
            for _ in range(workload.epochs):
                order = torch.randperm(len(d))
                for rows in order.split(workload.batch_size):
                    loss = cross_entropy(forward(d.x.index_select(0, rows)), d.y.index_select(0, rows))
                    model.gradient.zero_()
                    loss.backward()
                    model.parameters.add_(model.gradient, alpha=-lr)
            trained[client] = model.parameters.numpy()

    return run


def serial(task: Images, options: TrainOptions) -> Callable[[], None]:
    trainer = Trainer(task, options)
    initial = task.initial_arrays()
    config = ConfigRecord({keys.SERVER_ROUND: 1, keys.LOCAL_UPDATE: "sgd"})
    contexts = [
        new_context(node_id=client, node_config={"partition-id": client})
        for client in range(task.num_clients)
    ]

    def run() -> None:
        for client, context in enumerate(contexts):
            content = RecordDict({keys.ARRAYS: initial, keys.CONFIG: config})
            trainer.train(request(content, dst_node_id=client, message_type="train"), context)

    return run


def batched(task: Images, options: TrainOptions) -> Callable[[], None]:
    trainer = BatchedTrainer(task, options)
    model = FlatModel(task.seeded_model(0)).vector()
    clients = range(task.num_clients)
    states = [ClientState(RecordDict(), "sgd", 1) for _ in clients]
    out = np.empty((len(clients), len(model)), model.dtype)
    work = CohortWork(1, "sgd", options.lr, ConfigRecord(), model, {})
    at_once = trainer.chunk(len(model))

    def run() -> None:
        for start in range(0, len(clients), at_once):
            piece = slice(start, start + at_once)
            trainer.train(work, clients[piece], states[piece], out[piece])

    return run


def measure(workload: Workload, seconds: float) -> dict[str, object]:
    """Run the rivals in turns for ``seconds`` each."""
    task = Images(workload)
    options = TrainOptions(batch_size=workload.batch_size, local_epochs=workload.epochs, device="cpu")
    rivals = {"tight": tight(task, channels_last=False)}
    if "cnn" in workload.name or workload.name == "lenet":
        rivals["tight-nhwc"] = tight(task, channels_last=True)
    rivals |= {"serial": serial(task, options), "batched": batched(task, options)}
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for run in rivals.values():
        run()
    while sum(times["batched"]) < seconds or len(times["batched"]) < 3:
        if sum(times["tight"]) > seconds and len(times["tight"]) >= 3:
            break
        for name, run in rivals.items():
            started = time.process_time()
            run()
            times[name].append(time.process_time() - started)
    rates = {name: workload.clients / statistics.median(taken) for name, taken in times.items()}
    ratios = {
        f"batched/{name}": round(
            statistics.median(a / b for a, b in zip(times[name], times["batched"], strict=True)), 2
        )
        for name in rivals
        if name != "batched"
    }
    size = FlatModel(task.seeded_model(0)).size
    return {
        "workload": workload.name,
        "parameters": size,
        "client_updates_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        **ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="of each rival on each workload")
    parser.add_argument("--only", nargs="*", choices=[w.name for w in WORKLOADS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for workload in WORKLOADS:
        if not options.only or workload.name in options.only:
            print(json.dumps(measure(workload, options.seconds)), flush=True)


if __name__ == "__main__":
    main()
