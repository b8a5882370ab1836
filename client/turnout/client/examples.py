"""A client's training examples, on the device where it trains."""

from __future__ import annotations

import torch
from torch import Tensor

from turnout.tasks.task import ClientData, Task
from turnout.wire.errors import DataError


def client_examples(task: Task, client: int, device: str | torch.device) -> ClientData:
    """Return the examples of ``client`` on ``device``; `DataError` when there are none."""
    data = task.client_data(client)
    _check(task, client, data)
    if len(data) == 0:
        raise DataError(
            f"client {client} of task {task.name!r} has no training examples; give it "
            "participation probability 0, or set the partition's min_examples to 1 or more."
        )
    if torch.device(device).type == "cpu":
        return data
    return ClientData(data.x.to(device), data.y.to(device))


def _check(task: Task, client: int, data: ClientData) -> None:
    """Raise `DataError` unless x and y are tensors with one row for each example."""
    for name, value in (("x", data.x), ("y", data.y)):
        if not isinstance(value, Tensor) or value.dim() == 0:
            kind = "a single number" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise DataError(
                f"client {client} of task {task.name!r}: {name} is {kind}; client_data must return two "
                "tensors whose first dimension counts the examples (join several inputs into one tensor)."
            )
    if len(data.x) != len(data.y):
        raise DataError(
            f"client {client} of task {task.name!r} has {len(data.x)} rows of x but {len(data.y)} of y; "
            "client_data must return one target for each input."
        )
