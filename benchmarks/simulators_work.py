"""The learning problem that every simulator is given: clients, data, cohorts, minibatches and start alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from simulators_minilm import MiniLM, load_sentences
from turnout.client.minibatches import generator
from turnout.simulation import ParticipationModel
from turnout.tasks import ClientData, Task, known_loss
from turnout.tasks.classification import Examples, split_examples
from turnout.tasks.digits import load_digits
from turnout.tasks.fashion_mnist import load_fashion_mnist
from turnout.tasks.mnist5k import load_mnist5k
from turnout.tasks.models import image_model
from turnout.wire import DataError

CLASSES = 10
LABEL_MIX = 0.5  # Each client's mix of labels ~ Dirichlet(0.5).
POOL = 20_000  # Images that the clients' examples are drawn from; every process has its own copy of them.
_COHORT_STREAM, _PARTITION_STREAM = 1, 2


def cnn(channels: int, hidden: int) -> nn.Module:
    """Two 5x5 convolutions, each with a 2x2 pool, and two linear layers on images of 28x28."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * channels * 49, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES),
    )  # fmt: skip


def mlp(inputs: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


MODELS = {  # Name: data, module.
    "softmax": ("digits", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))),
    "mlp": ("digits", lambda: mlp(64, 64)),
    "mlp100k": ("images", lambda: mlp(784, 128)),
    "cnn100k": ("images", lambda: cnn(16, 64)),
    "lenet": ("images", lambda: image_model("lenet", 28, CLASSES)),
    "minilm": ("text", MiniLM),
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, N registered clients and k of them per round; with ``epochs=0`` they do nothing."""

    model: str
    clients: int
    cohort: int
    examples: int = 100
    batch_size: int = 20
    epochs: int = 1
    lr: float = 0.05
    seed: int = 0
    device: str = "cpu"
    test_examples: int = 10_000

    def __str__(self) -> str:
        return f"{self.model}, {self.cohort} of {self.clients:,} clients per round"

    @property
    def steps(self) -> int:
        """Local steps of one client in one round."""
        return self.epochs * -(-self.examples // self.batch_size)

    def cohort_of(self, server_round: int) -> list[int]:
        """Return the clients of a round, counted from 1: exactly ``cohort`` of them, ascending."""
        rng = np.random.default_rng([self.seed, _COHORT_STREAM, server_round])
        return sorted(rng.choice(self.clients, self.cohort, replace=False).tolist())


class Cohorts(ParticipationModel):
    """Exactly the workload's cohort takes part in each round."""

    def __init__(self, work: Workload) -> None:
        super().__init__(np.full(work.clients, work.cohort / work.clients))
        self.work = work

    def _mask(self, server_round: int) -> Any:
        mask = np.zeros(self.num_clients, dtype=np.bool_)
        mask[self.work.cohort_of(server_round)] = True
        return mask


class Federation(Task):
    """The workload's clients: their examples are rows of one shared tensor, gathered when they are asked for.

    ``rows`` is (clients, examples). A client's labels follow a mix of its own; examples may be in several
    clients. Unpickling makes it anew from the workload, so it travels between processes for nothing.
    """

    name = "simulators"

    def __init__(self, work: Workload) -> None:
        self.work, self.seed, self.num_clients = work, work.seed, work.clients
        train, test = _examples(MODELS[work.model][0], work.seed)
        self.x, self.y = (tensor.to(work.device) for tensor in _tensors(train))
        kept = [tensor[: work.test_examples].to(work.device) for tensor in _tensors(test)]
        self.test = ClientData(*kept)
        self.rows = torch.from_numpy(_rows(train.labels, work)).to(work.device)

    def __reduce__(self) -> Any:
        return Federation, (self.work,)

    def model(self) -> nn.Module:
        return MODELS[self.work.model][1]()

    def client_data(self, client: int) -> ClientData:
        rows = self.rows[client]
        return ClientData(self.x.index_select(0, rows), self.y.index_select(0, rows))

    def num_examples(self, client: int) -> int:
        return self.work.examples

    @known_loss("cross-entropy")
    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(output, y)

    def metrics(self, output: Tensor, y: Tensor) -> dict[str, float]:
        correct = float((output.argmax(1) == y).float().mean())
        return {"loss": float(self.loss(output, y)), "accuracy": correct}

    def test_data(self) -> ClientData:
        return self.test

    def initial(self) -> Tensor:
        """Return the flat initial model, in the order of the state_dict."""
        return flat(self.seeded_model(self.seed))

    def orders(self, client: int, server_round: int) -> Iterator[Tensor]:
        """Yield one permutation of the client's examples per epoch: the ones that Turnout's clients draw."""
        rng = generator(self.seed, client, server_round)
        for _ in range(self.work.epochs):
            yield torch.from_numpy(rng.permutation(self.work.examples)).to(self.work.device)

    def score(self, vector: np.ndarray[Any, Any]) -> dict[str, float]:
        """Return the metrics of a flat model on the test set."""
        model = self.model()
        nn.utils.vector_to_parameters(torch.from_numpy(vector), model.parameters())
        return self.evaluate_model(model.to(self.work.device), self.test)


def flat(model: nn.Module) -> Tensor:
    """Return a copy of a module's parameters as one vector."""
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def _examples(data: str, seed: int) -> tuple[Examples, Examples]:
    if data == "digits":
        return split_examples(load_digits(), 0.2, seed)
    if data == "text":
        return split_examples(load_sentences()[0], 0.2, seed)
    try:
        train, test = load_fashion_mnist()
    except DataError:
        return split_examples(load_mnist5k(), 0.2, seed)
    return train.take(np.random.default_rng(seed).permutation(len(train.labels))[:POOL]), test


def data_name(model: str) -> str:
    """Return the data set that ``model`` learns here."""
    if MODELS[model][0] == "digits":
        return "digits 8x8"
    if MODELS[model][0] == "text":
        return load_sentences()[1]
    try:
        load_fashion_mnist()
    except DataError:
        return "MNIST-5k"
    return "Fashion-MNIST"


def _tensors(examples: Examples) -> tuple[Tensor, Tensor]:
    labels = torch.from_numpy(examples.labels)
    if examples.x.ndim == 2:  # Token ids.
        return torch.from_numpy(examples.x.astype(np.int64)), labels
    scale = np.float32(16.0 if examples.x.shape[-1] == 8 else 255.0)
    return torch.from_numpy(examples.x.astype(np.float32) / scale)[:, None], labels


def _rows(labels: np.ndarray[Any, Any], work: Workload) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng([work.seed, _PARTITION_STREAM])
    classes = int(labels.max()) + 1
    mixes = rng.dirichlet(np.full(classes, LABEL_MIX), size=work.clients)
    counts = rng.multinomial(work.examples, mixes)
    wanted = np.repeat(np.tile(np.arange(classes), work.clients), counts.reshape(-1))
    rows = np.empty(len(wanted), dtype=np.int64)
    for label in range(classes):
        places = np.flatnonzero(wanted == label)
        rows[places] = rng.choice(np.flatnonzero(labels == label), len(places))
    return rows.reshape(work.clients, work.examples)
