"""Tasks with clients of many sizes, and the batched trainer held against the serial one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import nn

from turnout.client import ClientState, TrainOptions
from turnout.client.batched import BatchedTrainer, CohortOutcome, CohortWork
from turnout.tasks import ClassificationTask, ClientData, Task
from turnout.tasks.models import image_model
from turnout.wire import ParameterLayout
from turnout.wire.torch_threads import one_torch_thread

Vector = np.ndarray[Any, np.dtype[Any]]


class TwoBranches(nn.Module):
    """No sequence: two branches that are added, and a parameter that is used twice."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.straight = nn.Linear(inputs, classes)
        self.bent = nn.Linear(inputs, 6)
        self.out = nn.Linear(6, classes)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.scale * self.straight(x) + self.out(torch.tanh(self.scale * self.bent(x)))


class Ragged(Task):
    """Random examples; ``build`` returns the model, ``sizes`` are the clients' numbers of examples."""

    name = "ragged"
    classes = 4

    def __init__(
        self,
        build: Callable[[], nn.Module],
        sizes: Sequence[int],
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.build, self.dtype = build, dtype
        self.num_clients = len(sizes)
        rng = np.random.default_rng(3)
        self.data = [
            ClientData(
                torch.from_numpy(rng.standard_normal((size, *shape))).to(dtype),
                torch.from_numpy(rng.integers(0, self.classes, size)),
            )
            for size in sizes
        ]

    def model(self) -> nn.Module:
        return self.build().to(self.dtype)

    def client_data(self, client: int) -> ClientData:
        return self.data[client]

    loss = ClassificationTask.loss


SIZES = (7, 25, 1, 10, 12, 10, 30)


def ragged(name: str, sizes: Sequence[int] = SIZES, **settings: Any) -> Ragged:
    """Return a task whose model is called ``name``."""
    if name == "two-branches":
        return Ragged(lambda: TwoBranches(36, 4), sizes, (1, 6, 6), **settings)
    side = 12 if name == "lenet" else 6
    return Ragged(lambda: image_model(name, side, 4), sizes, (1, side, side), **settings)


@dataclass
class Cohorts:
    """Sends the same requests to the serial and to the batched trainer and compares all that comes back."""

    task: Task
    ask: Callable[..., Any]
    options: dict[str, Any]

    def __post_init__(self) -> None:
        self.initial = self.task.initial_arrays()
        self.layout = ParameterLayout.from_arrays(self.initial)
        self.clients = [
            self.ask(self.task, client, **self.options) for client in range(self.task.num_clients)
        ]
        self.trainer = BatchedTrainer(self.task, TrainOptions(**self.options))
        self.stores = [RecordDict() for _ in self.clients]
        self.rng = np.random.default_rng(11)

    def vector(self, scale: float = 0.3) -> Vector:
        return (scale * self.rng.standard_normal(self.layout.size)).astype(self.layout.dtype)

    def batched(self, work: CohortWork, cohort: Sequence[int]) -> tuple[Vector, CohortOutcome]:
        out = np.full((len(cohort), self.layout.size), np.nan, self.layout.dtype)
        states = [ClientState(self.stores[c], work.local_update, work.server_round) for c in cohort]
        return out, self.trainer.train(work, cohort, states, out)

    def compare(
        self,
        local_update: str,
        config: Mapping[str, Any] | None = None,
        records: Iterable[str] = (),
        *,
        rounds: Iterable[int] = (1, 2, 4),
        tolerance: float = 1e-10,
    ) -> None:
        assert self.trainer.refusal(local_update) is None
        for server_round in rounds:
            cohort = [c for c in range(len(self.clients)) if (c + server_round) % 3 or server_round == 4]
            model, vectors = self.vector(), {key: self.vector(0.05) for key in records}
            lr = float(self.options.get("lr", 0.1))
            work = CohortWork(
                server_round, local_update, lr, ConfigRecord(dict(config or {})), model, vectors
            )
            out, outcome = self.batched(work, cohort)
            assert not outcome.failures
            for i, client in enumerate(cohort):
                asked = self.clients[client]
                answer = asked.train(
                    model, local_update, server_round=server_round, config=config, records=vectors
                )
                main = "gradient" if local_update == "anchor" else "arrays"
                close(out[i], answer.read(main), tolerance)
                close(outcome.losses[i], answer.metrics["train-loss"], tolerance)
                extras = {key for key in answer.content if key not in (main, "metrics")}
                assert extras == set(outcome.extras)
                for key in extras:
                    close(outcome.extras[key][i], answer.read(key), tolerance)
                self._compare_states(client, local_update, tolerance)

    def _compare_states(self, client: int, local_update: str, tolerance: float) -> None:
        kept, expected = self.stores[client], self.clients[client].context.state
        assert set(kept) == {key for key in expected if local_update in key}
        for key, record in kept.items():
            if not isinstance(record, ArrayRecord):
                assert record == expected[key]
                continue
            assert set(record) == set(expected[key])
            for name, array in record.items():
                close(array.numpy(), expected[key][name].numpy(), tolerance)


def close(value: Any, expected: Any, tolerance: float) -> None:
    """Compare relative to the largest number of the vector: its small ones carry the same rounding."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance * max(scale, 1e-30))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Train as the simulator does."""
    with one_torch_thread():
        yield


@pytest.fixture
def cohorts(ask: Callable[..., Any]) -> Callable[..., Cohorts]:
    """Return ``cohorts(task, **client_app options)``."""
    return lambda task, **options: Cohorts(task, ask, options)


@pytest.fixture
def make_task() -> Callable[..., Ragged]:
    """Return `ragged`."""
    return ragged


@pytest.fixture
def make_custom() -> type[Ragged]:
    """Return `Ragged`, for models of a test's own."""
    return Ragged
