"""What a model does not train (frozen parameters, float buffers) stays, whatever the optimizer does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from turnout.client import client_app
from turnout.simulation import LocalGrid
from turnout.strategies import FedAMD, FedAvg, FedProx
from turnout.tasks import ClientData, Task
from turnout.wire import view

DECAYING: dict[str, dict[str, Any]] = {
    "sgd": {"weight_decay": 0.1},
    "momentum": {"weight_decay": 0.1, "momentum": 0.9},
    "adamw": {"optimizer": "adamw"},  # Decays by 0.01 unless told otherwise.
    "asgd": {"optimizer": "asgd", "optimizer_options": {"lambd": 0.1}},
}


class HalfFrozen(Task):
    """A frozen layer under a trained one, and with ``shift`` a buffer of floats that is no statistic."""

    name = "half-frozen"
    num_clients = 3

    def __init__(self, *, shift: bool) -> None:
        self.shift = shift

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        model[0].requires_grad_(False)
        if self.shift:
            model.register_buffer("shift", torch.ones(2))
        return model

    def client_data(self, client: int) -> ClientData:
        generator = torch.Generator().manual_seed(client)
        return ClientData(torch.randn(5 + client, 3, generator=generator), torch.ones(5 + client, 1))

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return (output - y).square().mean()


@pytest.mark.parametrize("executor", ["serial", "batched"])
@pytest.mark.parametrize("options", DECAYING.values(), ids=DECAYING)
def test_no_optimizer_moves_what_is_not_trained(options, executor):
    task = HalfFrozen(shift=executor == "serial")
    app = client_app(task, lr=0.1, batch_size=2, local_epochs=2, **options)
    plain = options.keys() == {"weight_decay"}
    for strategy in (FedAvg(), FedProx(proximal_mu=0.3), *([FedAMD()] if plain else [])):
        before = task.initial_arrays()
        after = strategy.start(
            LocalGrid(app, task.num_clients, executor=executor), before, num_rounds=2
        ).arrays
        moved = {name for name in before if not np.array_equal(view(before[name]), view(after[name]))}
        assert moved == {"2.weight", "2.bias"}
