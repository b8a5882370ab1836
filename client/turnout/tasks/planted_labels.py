"""Digits of which some have a wrong label planted: shows what a network memorises."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord
from torch import nn

from turnout.tasks.classification import Examples, ImageTask, split_examples
from turnout.tasks.hyper_representation import Source, load_source
from turnout.tasks.label_noise import plant_wrong_labels
from turnout.tasks.partition import Partitioner
from turnout.tasks.task import ClientData
from turnout.tasks.validation import check_count
from turnout.wire.registry import register


@register(
    "planted-labels",
    kind="task",
    paper="2510.24256",
    summary="Digits or MNIST-5k with planted wrong labels: measures memorisation",
)
class PlantedLabels(ImageTask):
    """Training examples of which a share has a random wrong label; the test examples are clean.

    Beside ``accuracy`` and ``loss`` on the test examples, evaluation says of the planted training examples
    which share gets the planted label (``memorised``) and which the true one (``recovered``), and of the
    others which share is right (``train-accuracy``).

    data
        ``"digits"`` (8x8) or ``"mnist5k"`` (28x28).
    train_examples
        Training examples in all; the first so many of the shuffled ones.
    planted
        Share of them with a wrong label.
    width
        Units of each of the two hidden layers.
    """

    name = "planted-labels"

    def __init__(
        self,
        *,
        num_clients: int = 5,
        data: Source = "digits",
        train_examples: int = 1200,
        planted: float = 0.1,
        width: int = 256,
        partition: str | Partitioner = "iid",
        seed: int = 0,
        **partition_options: Any,
    ) -> None:
        check_count("train_examples", train_examples, low=num_clients)
        check_count("width", width, low=1)
        examples, self.side, self.scale = load_source(data)
        self.width = width
        train, test = split_examples(examples, 0.2, seed)
        rows = slice(0, train_examples)
        x, noisy = train.x[rows], plant_wrong_labels(train.labels[rows], planted, self.classes, seed)
        super().__init__(
            Examples(x, noisy.labels), test, model="mlp", num_clients=num_clients, partition=partition,
            seed=seed, partition_options=partition_options,
        )  # fmt: skip
        wrong = torch.from_numpy(noisy.wrong)
        self._inputs = self.features(x)
        self._labels, self._true = torch.from_numpy(noisy.labels), torch.from_numpy(noisy.true)
        self._wrong = wrong

    def model(self) -> nn.Module:
        """Return a perceptron of three Linear layers, "1", "3" and "5", in He's initialisation."""
        module = nn.Sequential(
            nn.Flatten(),
            nn.Linear(self.side**2, self.width), nn.ReLU(),
            nn.Linear(self.width, self.width), nn.ReLU(),
            nn.Linear(self.width, self.classes),
        )  # fmt: skip
        for layer in module:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        return module

    def evaluate(self, arrays: ArrayRecord) -> dict[str, float]:
        """Return the test metrics, and what the model says of the training examples."""
        model = self.loaded_model(arrays)
        metrics = self.evaluate_model(model, self.test_data())
        return metrics | self.memorisation(model)

    def memorisation(self, model: nn.Module) -> dict[str, float]:
        """Return how the training examples are answered: the planted ones, and the rest."""
        model.eval()
        with torch.no_grad():
            said = model(self._inputs).argmax(dim=1)
        wrong = self._wrong
        shares = {
            "memorised": said[wrong] == self._labels[wrong],
            "recovered": said[wrong] == self._true[wrong],
            "train-accuracy": said[~wrong] == self._true[~wrong],
        }
        return {name: float(hits.double().mean()) for name, hits in shares.items() if len(hits)}

    def whole_training_data(self) -> ClientData:
        """Return all training examples with the labels that clients see."""
        return ClientData(self._inputs, self._labels)
