"""A client's training examples, on the device where it trains."""

from __future__ import annotations

import torch

from turnout.tasks.task import ClientData, Task
from turnout.wire.errors import DataError


def client_examples(task: Task, client: int, device: str | torch.device) -> ClientData:
    """Return the examples of ``client`` on ``device``; `DataError` when there are none."""
    data = task.client_data(client)
    if len(data) == 0:
        raise DataError(
            f"client {client} of task {task.name!r} has no training examples; give it "
            "participation probability 0, or set the partition's min_examples to 1 or more."
        )
    if torch.device(device).type == "cpu":
        return data
    return ClientData(data.x.to(device), data.y.to(device))
