"""Which models have layers written by hand, and that those compute what PyTorch computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from turnout.client.batched.batches import ClientExamples
from turnout.client.batched.layered_engine import LayeredEngine
from turnout.client.batched.vmap_engine import VmapEngine
from turnout.tasks import ClientData, known_loss

SIZES = (9, 4, 4, 13)


class OwnLinear(nn.Linear):
    """Looks like a linear layer and is none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


def hooked() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 4))
    module[0].register_forward_hook(lambda layer, args, output: output * 2.0)
    return module


def shared_activation() -> nn.Module:
    tanh = nn.Tanh()
    return nn.Sequential(nn.Linear(5, 6), tanh, nn.Linear(6, 6), tanh, nn.Linear(6, 4))


def replaced_forward() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 4))
    plain = module[0].forward
    module[0].forward = lambda x: 2.0 * plain(x)
    return module


def frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 4))
    module[0].weight.requires_grad_(False)
    return module


BY_HAND = {
    "bare": (lambda: nn.Linear(5, 4), (5,)),
    "no-bias": (
        lambda: nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False)),
        (5,),
    ),
    "tanh-sigmoid": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Sigmoid(), nn.Linear(7, 4)),
        (5,),
    ),
    "shared-activation": (shared_activation, (5,)),
    "linear-linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Linear(5, 4)), (2, 3)),
    "colour": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 4)
        ),
        (3, 6, 7),
    ),
    "pool-first": (
        lambda: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)),
        (2, 6, 6),
    ),
    "overlapping-pools": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, (3, 1), padding="same", bias=False),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(2, 3, 3, padding=(1, 0)),
            nn.MaxPool2d(2, stride=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(3 * 3 * 1, 4),
        ),
        (1, 8, 8),
    ),
}
NOT_BY_HAND = {
    "own-layer": (lambda: nn.Sequential(OwnLinear(5, 4)), (5,)),
    "hook": (hooked, (5,)),
    "replaced-forward": (replaced_forward, (5,)),
    "frozen": (frozen, (5,)),
    "activation-of-data": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(5, 4)), (5,)),
    "activation-last": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh()), (5,)),
    "two-activations": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.ReLU(), nn.Linear(4, 4)), (5,)),
    "strided": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 2, stride=2), nn.Flatten(), nn.Linear(36, 4)),
        (1, 6, 6),
    ),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(100, 4)),
        (2, 6, 6),
    ),
    "reflected": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(72, 4)
        ),
        (1, 6, 6),
    ),
    "normalised": (lambda: nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 4)), (5,)),
}


def engine_of(both):
    kind = ClientExamples(both.task.client_data(0)).kind
    return both.trainer._engine(kind)


@pytest.mark.parametrize("at_once", [1, 64])
@pytest.mark.parametrize("name", BY_HAND)
def test_layers_written_by_hand(cohorts, make_custom, monkeypatch, name, at_once):
    monkeypatch.setattr("turnout.client.batched.trainer._CPU_CLIENTS", at_once)
    build, shape = BY_HAND[name]
    both = cohorts(make_custom(build, SIZES, shape), batch_size=5, weight_decay=0.01, local_epochs=2)
    assert isinstance(engine_of(both), LayeredEngine)
    for local_update, config, records in (("sgd", {}, ()), ("miner", {}, ("bullseye",)), ("anchor", {}, ())):
        both.compare(local_update, config, records, rounds=(1,))


@pytest.mark.parametrize("few", [2, 100])
@pytest.mark.parametrize("name", NOT_BY_HAND)
def test_other_modules_are_differentiated_by_torch(cohorts, make_custom, monkeypatch, name, few):
    monkeypatch.setattr("turnout.client.batched.vmap_engine._FEW", few)
    build, shape = NOT_BY_HAND[name]
    both = cohorts(make_custom(build, SIZES, shape), batch_size=5, weight_decay=0.01, local_epochs=2)
    assert isinstance(engine_of(both), VmapEngine)
    for local_update, config, records in (("sgd", {}, ()), ("miner", {}, ("bullseye",)), ("anchor", {}, ())):
        both.compare(local_update, config, records, rounds=(1,))


def test_mean_squared_error(cohorts, make_custom):
    class Regression(make_custom):
        @known_loss("mean-squared-error")
        def loss(self, output, y):
            return mse_loss(output, y)

    task = Regression(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)), SIZES, (5,))
    task.data = [ClientData(d.x, d.x[:, :2] * 2.0) for d in task.data]
    both = cohorts(task, batch_size=5)
    assert isinstance(engine_of(both), LayeredEngine)
    both.compare("sgd", rounds=(1,))
    both.compare("anchor", rounds=(1,))


def test_a_loss_that_is_overridden_is_never_taken_for_the_known_one(cohorts, make_custom):
    class Smoothed(make_custom):
        def loss(self, output, y):
            return cross_entropy(output, y, label_smoothing=0.1)

    task = Smoothed(lambda: nn.Linear(5, 4), SIZES, (5,))
    both = cohorts(task, batch_size=5)
    assert isinstance(engine_of(both), VmapEngine)
    both.compare("sgd", rounds=(1,))

    task = make_custom(lambda: nn.Linear(5, 4), SIZES, (5,))
    task.loss = lambda output, y: cross_entropy(output, y, label_smoothing=0.1)
    both = cohorts(task, batch_size=5)
    assert isinstance(engine_of(both), VmapEngine)
    both.compare("sgd", rounds=(1,))


def test_targets_of_another_kind_go_to_torch(cohorts, make_custom):
    task = make_custom(lambda: nn.Linear(5, 4), SIZES, (5,))
    task.data = [ClientData(d.x, torch.softmax(d.x[:, :4], dim=1)) for d in task.data]
    both = cohorts(task, batch_size=5)
    assert isinstance(engine_of(both), VmapEngine)
    both.compare("sgd", rounds=(1,))
