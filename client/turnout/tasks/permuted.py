"""A sequence of tasks: the same images with their pixels shuffled anew in each."""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from turnout.tasks.classification import ImageTask, split_examples
from turnout.tasks.hyper_representation import Source, load_source
from turnout.tasks.partition import Partitioner
from turnout.tasks.task import ClientData
from turnout.tasks.validation import check_count
from turnout.wire.errors import unknown_name
from turnout.wire.registry import register

Net = Literal["binary", "float"]
_NETS: Final = ("binary", "float")
# Mean and deviation of all pixels, fixed. A binary layer divides by the root of its fan-in, which makes units
# of inputs whose second moment is 1: raw grey values (digits: 0.23) halve them, and fields saturate too late
# to protect what earlier tasks learned.
_MOMENTS: Final = {"digits": (0.3053, 0.3760), "mnist5k": (0.1307, 0.3081)}


@register(
    "permuted",
    kind="task",
    paper="2212.02846",
    summary="Continual learning: digits or MNIST-5k under one pixel shuffle after another",
)
class Permuted(ImageTask):
    """Tasks one after the other, some rounds each; the last one goes on.

    Task 1 are the images themselves, each later one shuffles all pixels by a seeded permutation. Labels and
    clients' examples stay the same. Pixels have mean 0 and variance 1, by fixed constants. Evaluation is on
    all tasks: ``accuracy`` and ``loss`` are their means, ``accuracy-1``, ``accuracy-2``, ... the tasks'. A
    binary model is evaluated with its deployed, 1-bit weights.

    data
        ``"digits"`` (8x8) or ``"mnist5k"`` (28x28).
    model
        ``"binary"``: two hidden layers of ``width`` ReLU units, all weights binary, no biases. ``"float"``:
        the same with ordinary weights and biases.
    width
        Units of a hidden layer.
    num_tasks
        Number of tasks.
    rounds_per_task
        Rounds of each task but the last.
    """

    name = "permuted"

    def __init__(
        self,
        *,
        num_clients: int = 5,
        data: Source = "digits",
        model: Net = "binary",
        width: int = 200,
        num_tasks: int = 3,
        rounds_per_task: int = 10,
        partition: str | Partitioner = "iid",
        seed: int = 0,
        **partition_options: Any,
    ) -> None:
        for field, count in (
            ("width", width),
            ("num_tasks", num_tasks),
            ("rounds_per_task", rounds_per_task),
        ):
            check_count(field, count, low=1)
        if model not in _NETS:
            raise unknown_name("model", model, _NETS)
        examples, self.side, self.scale = load_source(data)
        self.mean, self.std = _MOMENTS[data]
        self.width, self.num_tasks, self.rounds_per_task = width, num_tasks, rounds_per_task
        rng = np.random.default_rng([seed, 7])
        orders = [np.arange(self.side**2)] + [rng.permutation(self.side**2) for _ in range(num_tasks - 1)]
        self._orders = [torch.from_numpy(order) for order in orders]
        train, test = split_examples(examples, 0.2, seed)
        super().__init__(
            train, test, model=model, num_clients=num_clients, partition=partition, seed=seed,
            partition_options=partition_options,
        )  # fmt: skip

    def model(self) -> nn.Module:
        """Return a new network of the kind the task was made with."""
        # Here, because importing the optimizers imports tasks.
        from turnout.optim.binary_fields import BinaryFieldLinear

        pixels, width, classes = self.side**2, self.width, self.classes
        layer = BinaryFieldLinear if self.model_name == "binary" else nn.Linear
        return nn.Sequential(
            nn.Flatten(),
            layer(pixels, width),
            nn.ReLU(),
            layer(width, width),
            nn.ReLU(),
            layer(width, classes),
        )

    def task_at(self, server_round: int) -> int:
        """Return which task ``server_round`` trains on, from 0."""
        return min(max(server_round - 1, 0) // self.rounds_per_task, self.num_tasks - 1)

    def examples_at(self, data: ClientData, server_round: int) -> ClientData:
        """Return the client's examples under the shuffle of the round's task."""
        return ClientData(self.shuffled(data.x, self.task_at(server_round)), data.y)

    def shuffled(self, x: Tensor, task: int) -> Tensor:
        """Return images ``x`` with their pixels in the order of ``task``."""
        order = self._orders[task].to(x.device)
        return x.reshape(len(x), -1).index_select(1, order).reshape(x.shape)

    def evaluate(self, arrays: ArrayRecord) -> dict[str, float]:
        """Return the mean accuracy and loss over the tasks, and each task's accuracy."""
        return self.evaluate_tasks(self.loaded_model(arrays))

    def evaluate_tasks(
        self, model: nn.Module, weights: Literal["binary", "mean-field"] = "binary"
    ) -> dict[str, float]:
        """Return the same for ``model``; ``weights`` says with which weights binary layers are evaluated."""
        from turnout.optim.binary_fields import evaluate_with

        evaluate_with(model, weights)
        test = self.test_data()
        found = [
            self.evaluate_model(model, ClientData(self.shuffled(test.x, task), test.y))
            for task in range(self.num_tasks)
        ]
        means = {name: sum(m[name] for m in found) / len(found) for name in ("loss", "accuracy")}
        return means | {f"accuracy-{task}": m["accuracy"] for task, m in enumerate(found, start=1)}
