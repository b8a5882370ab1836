"""The small models of the image tasks. None has dropout or other randomness in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch import nn

from turnout.wire.errors import ConfigError, unknown_name


def softmax(side: int, classes: int) -> nn.Module:
    """Return softmax regression on ``side`` x ``side`` pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(side * side, classes))


def mlp(side: int, classes: int) -> nn.Module:
    """Return a perceptron with one hidden layer of 64 units (digits: 64-64-10)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(side * side, 64), nn.ReLU(), nn.Linear(64, classes))


def cnn(side: int, classes: int) -> nn.Module:
    """Return two 3x3 convolutions of 8 and 16 channels, each with a 2x2 pool, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (side // 4) ** 2, classes),
    )


def lenet(side: int, classes: int) -> nn.Module:
    """Return LeNet-5 with ReLU and max pooling: convolutions of 6 and 16 channels, then 120-84-classes."""
    if side < 12:
        raise ConfigError(f"model 'lenet' needs images of 12 pixels or more, got {side}; use model='cnn'.")
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (side // 4 - 2) ** 2, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


_MODELS: Final[dict[str, Callable[[int, int], nn.Module]]] = {
    "softmax": softmax,
    "mlp": mlp,
    "cnn": cnn,
    "lenet": lenet,
}


def image_model(name: str, side: int, classes: int) -> nn.Module:
    """Return the model ``name`` for images of shape (1, side, side); an unknown name raises `ConfigError`."""
    if name not in _MODELS:
        raise unknown_name("model", name, _MODELS)
    return _MODELS[name](side, classes)
