"""Layers of binary weights that are trained through real fields (arXiv 2212.02846).

A weight w is +1 or -1 with ``E[w] = mu = tanh(beta theta)`` and variance ``s = 1 - mu^2``. In training a
unit's input is drawn from the normal distribution that the sum over its weights has (one draw per sample and
unit); in evaluation the weights are ``sign(theta)``, what a deployed model stores in one bit each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, softplus

from turnout.tasks.validation import check_count, check_number
from turnout.wire.errors import ConfigError

Weights = Literal["binary", "mean-field"]
_TINY = 1e-12  # Keeps the square root's derivative finite where all weights are saturated.


class BinaryField(nn.Module):
    """Base of the layers: the fields ``theta``, no bias.

    ``beta`` is the temperature's inverse, a plain attribute that all layers of a model share
    (`set_temperature`). ``evaluates`` says what evaluation uses: ``"binary"`` weights, or their means.
    ``generator`` draws the noise of training; None is torch's global one.
    """

    theta: nn.Parameter

    def __init__(self, shape: tuple[int, ...], beta: float) -> None:
        check_number("beta", beta, low=0, open_low=True)
        super().__init__()
        # Small fields make every weight a coin that few steps decide; unit variance is what the method needs.
        self.theta = nn.Parameter(torch.randn(shape))
        self.beta = float(beta)
        self.fan_in = math.prod(shape[1:])
        self.evaluates: Weights = "binary"
        self.generator: torch.Generator | None = None

    def apply_weights(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return the layer's linear map with ``weights``, shaped like ``theta``."""
        raise NotImplementedError

    def magnetisation(self) -> Tensor:
        """Return mu, the weights' means, shaped like ``theta``."""
        return torch.tanh(self.beta * self.theta)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the units' inputs over the weights' distribution, for each sample."""
        mu = self.magnetisation()
        mean = self.apply_weights(x, mu) / math.sqrt(self.fan_in)
        variance = self.apply_weights(x * x, 1 - mu * mu) / self.fan_in
        return mean, variance

    def forward(self, x: Tensor) -> Tensor:
        """Return a draw of the units' inputs in training, their value for fixed weights in evaluation."""
        if self.training:
            mean, variance = self.moments(x)
            noise = torch.randn(mean.shape, generator=self.generator, dtype=mean.dtype, device=mean.device)
            return mean + (variance.clamp_min(0) + _TINY).sqrt() * noise
        weights = signs(self.theta) if self.evaluates == "binary" else self.magnetisation()
        return self.apply_weights(x, weights) / math.sqrt(self.fan_in)


class BinaryFieldLinear(BinaryField):
    """Linear map of binary weights, scaled by 1/sqrt(in): x (..., in) to (..., out). theta: (out, in)."""

    def __init__(self, in_features: int, out_features: int, beta: float = 1.0) -> None:
        check_count("in_features", in_features, low=1)
        check_count("out_features", out_features, low=1)
        super().__init__((out_features, in_features), beta)

    def apply_weights(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return ``x weights^T``."""
        return linear(x, weights)


class BinaryFieldConv2d(BinaryField):
    """Convolution of binary weights, scaled by 1/sqrt(fan-in): (N, C, H, W) to (N, out, H', W').

    theta: (out, in, kernel, kernel). Padding is with zeros, which add neither mean nor variance.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        beta: float = 1.0,
        *,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        for field, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            check_count(field, value, low=1)
        check_count("kernel_size", kernel_size, low=1)
        check_count("stride", stride, low=1)
        check_count("padding", padding, low=0)
        super().__init__((out_channels, in_channels, kernel_size, kernel_size), beta)
        self.stride, self.padding = stride, padding

    def apply_weights(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return the convolution of ``x`` with ``weights``."""
        return conv2d(x, weights, stride=self.stride, padding=self.padding)


def field_layers(module: nn.Module) -> Iterator[BinaryField]:
    """Yield the layers of binary weights in ``module``."""
    return (layer for layer in module.modules() if isinstance(layer, BinaryField))


def set_temperature(module: nn.Module, beta: float) -> None:
    """Set the inverse temperature of all layers of ``module``; a larger one sharpens every weight."""
    check_number("beta", beta, low=0, open_low=True)
    for layer in field_layers(module):
        layer.beta = float(beta)


def rescale_fields(module: nn.Module, beta: float) -> None:
    """Change to inverse temperature ``beta`` without changing any weight's distribution."""
    check_number("beta", beta, low=0, open_low=True)
    with torch.no_grad():
        for layer in field_layers(module):
            layer.theta.mul_(layer.beta / beta)
            layer.beta = float(beta)


def set_noise(module: nn.Module, generator: torch.Generator | None) -> None:
    """Let all layers of ``module`` draw their noise from ``generator``."""
    for layer in field_layers(module):
        layer.generator = generator


def evaluate_with(module: nn.Module, weights: Weights) -> None:
    """Choose what all layers of ``module`` use in evaluation: ``"binary"`` weights or their means."""
    if weights not in ("binary", "mean-field"):
        raise ConfigError(f"weights={weights!r} is not possible; use 'binary' or 'mean-field'.")
    for layer in field_layers(module):
        layer.evaluates = weights


def signs(theta: Tensor) -> Tensor:
    """Return the deployed weights, +1 where ``theta >= 0`` and -1 elsewhere."""
    return torch.where(theta >= 0, 1.0, -1.0).to(theta.dtype)


def log_cosh(x: Tensor) -> Tensor:
    """Return ``ln cosh x`` without overflow."""
    return x.abs() + softplus(-2 * x.abs()) - math.log(2)


def field_kl(theta: Tensor, prior: Tensor, beta: float) -> Tensor:
    """Return ``KL[q_theta || q_prior]``, summed over the weights.

    Its gradient with respect to theta is ``beta^2 s (theta - prior)``.
    """
    x, x0 = beta * theta, beta * prior
    return (torch.tanh(x) * (x - x0) - log_cosh(x) + log_cosh(x0)).sum()
