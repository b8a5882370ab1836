"""A quadratic federation small enough to follow by hand, and a client that is asked directly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from turnout.client import client_app
from turnout.tasks import Task
from turnout.tasks.least_squares import Design, LeastSquaresTask
from turnout.wire import ParameterLayout, keys
from turnout.wire.flower import new_context, request

Vector = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Answer:
    """A reply, read: the model vector if there is one, all records, the metrics."""

    content: RecordDict
    layout: ParameterLayout

    @property
    def vector(self) -> Vector:
        return self.read("arrays")

    @property
    def metrics(self) -> MetricRecord:
        record = self.content["metrics"]
        assert isinstance(record, MetricRecord)
        return record

    def read(self, key: str, *, with_buffers: bool = False) -> Vector:
        record = self.content[key]
        assert isinstance(record, ArrayRecord)
        return np.array(self.layout.flatten(record, with_buffers=with_buffers))


@dataclass
class AskedClient:
    """One client of an app, with its context; `train` sends it a request as a strategy would."""

    app: ClientApp
    layout: ParameterLayout
    client: int
    buffers: dict[str, Vector] | None = None
    context: Context = field(init=False)

    def __post_init__(self) -> None:
        self.context = new_context(node_id=1_000 + self.client, node_config={"partition-id": self.client})

    def train(
        self,
        x: Vector,
        local_update: str = "sgd",
        *,
        server_round: int = 1,
        config: Mapping[str, Any] | None = None,
        records: Mapping[str, Vector] | None = None,
        message_type: str = "train",
    ) -> Answer:
        content = RecordDict({"arrays": self.layout.record(x.copy(), self.buffers)})
        for key, vector in (records or {}).items():
            content[key] = self.layout.record(vector.copy())
        values = {keys.SERVER_ROUND: server_round, keys.LOCAL_UPDATE: local_update, **(config or {})}
        content["config"] = ConfigRecord(values)
        message = request(content, dst_node_id=self.context.node_id, message_type=message_type)
        return Answer(self.app(message, self.context).content, self.layout)


@pytest.fixture
def quadratic() -> LeastSquaresTask:
    """Four clients, five unknowns, seven rows each: curved, all different, float64."""
    rng = np.random.default_rng(7)
    designs = [
        Design(rng.standard_normal((7, 5)), rng.standard_normal(7), rng.uniform(0.02, 0.1, 7))
        for _ in range(4)
    ]
    task = LeastSquaresTask(tuple(designs))
    task.name = "quadratic"
    return task


@pytest.fixture
def ask() -> Callable[..., AskedClient]:
    """Return ``ask(task, client, **client_app options)``: that client, ready to be asked."""

    def make(task: Task, client: int = 0, **options: Any) -> AskedClient:
        initial = task.initial_arrays()
        layout = ParameterLayout.from_arrays(initial)
        buffers = {name: np.array(value) for name, value in layout.buffers_of(initial).items()}
        return AskedClient(client_app(task, **options), layout, client, buffers)

    return make


@pytest.fixture
def gradient() -> Callable[..., Vector]:
    """Return ``gradient(task, client, w, rows=None)``: a client's exact gradient over some of its rows."""

    def of(task: LeastSquaresTask, client: int, w: Vector, rows: Any = None) -> Vector:
        d = task.designs[client]
        chosen = np.arange(len(d.y)) if rows is None else np.asarray(rows)
        weights = 2.0 * len(d.y) / len(chosen) * d.weights[chosen]
        result: Vector = d.x[chosen].T @ (weights * (d.x[chosen] @ w - d.y[chosen]))
        return result

    return of
