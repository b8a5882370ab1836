"""Weight Compander: weights behind a bounded, odd, increasing function (arXiv 2306.16993).

The function is a reconstruction from the abstract, ``psi(v) = a arctan(v / b)``. All weights are trained:
it is a reparametrisation, not a saving.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from turnout.peft.config import AdapterConfig, Aggregation
from turnout.peft.layer import AdapterLayer, weight_of
from turnout.tasks.training_part import TrainingPart
from turnout.tasks.validation import check_number
from turnout.wire.errors import ConfigError, unknown_name
from turnout.wire.registry import register

_MARGIN = 1e-4  # Of the argument of the tangent to pi / 2.
_SATURATED = 20.0  # |v| / b beyond which the gradient is below 1/400 of its largest.


class Compander(nn.Module):
    """``psi(v) = a arctan(v / b)``, for `torch.nn.utils.parametrize` and by itself.

    ``|psi| < a pi / 2``, ``psi'(0) = a / b``. a and b may be numbers or scalar tensors.
    """

    def __init__(self, a: float | Tensor, b: float | Tensor) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, v: Tensor) -> Tensor:
        """Return the effective weight of the latent one."""
        return self.a * torch.atan(v / self.b)

    def right_inverse(self, w: Tensor) -> Tensor:
        """Return the latent weight ``b tan(w / a)``; what is at the bound, or beyond, is moved inside."""
        limit = math.pi / 2 - _MARGIN
        return self.b * torch.tan((w / self.a).clamp(-limit, limit))


@register(
    "weight-compander", kind="adapter", paper="2306.16993", summary="Weights behind a bounded function (WC)"
)
@dataclass(frozen=True, kw_only=True)
class WeightCompanderConfig(AdapterConfig):
    """Weight Compander: local steps are taken in v, ``W = a arctan(v / b)``, a and b per layer.

    What travels is every weight and bias of the chosen layers, and a and b if they are trained. By default
    the weights themselves travel (``"effective"``): their mean is exact, and has a v again whatever a the
    clients had. Then it takes Turnout's clients to step in v; other training loops use "latent".

    Attributes
    ----------
    a
        Bound of a layer's weights, in units of 2/pi times the largest absolute one at first; above 1.
    gain
        a / b: by how much small weights are spread, the slope at 0.
    learnable
        Train a and b.
    shape_lr
        Share of the optimizer's step that a and b take, where the effective weights travel.
    transfer
        "effective" sends W; "latent" sends v, whose mean is not the mean of the weights.
    """

    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d)
    adapts_transposed: ClassVar[bool] = False

    a: float = 1.5
    gain: float = 2.0
    learnable: bool = False
    shape_lr: float = 0.1
    transfer: Literal["effective", "latent"] = "effective"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("a", self.a, low=2 / math.pi, open_low=True)
        check_number("gain", self.gain, low=0, open_low=True)
        check_number("shape_lr", self.shape_lr, low=0, high=1)
        if self.transfer not in ("effective", "latent"):
            raise unknown_name("transfer", str(self.transfer), ("effective", "latent"))

    @property
    def aggregation(self) -> Aggregation:  # type: ignore[override]
        """Exact where the effective weights travel."""
        return "exact" if self.transfer == "effective" else "approximate"

    def layer(self, name: str, base_layer: nn.Module, generator: torch.Generator) -> WeightCompander:
        """Return the companded form of ``base_layer``. Raises `ConfigError` for a layer of zeros."""
        if not weight_of(base_layer).any():
            raise ConfigError(f"layer {name!r} has only zeros, which give no scale for a; exclude it.")
        return WeightCompander(base_layer, self)


class WeightCompander(AdapterLayer, TrainingPart):
    """A layer whose ``wc_weight`` (and ``wc_bias``) is trained, with ``wc_a`` (1,) and ``wc_b`` (1,).

    With "effective", ``wc_weight`` is W wherever it is seen, but for the optimizer: between `enter_step` and
    `leave_step` it is v, and trained a and b are behind softplus. With "latent" that is so always.
    """

    config: WeightCompanderConfig
    stackable = False

    def __init__(self, base_layer: nn.Module, config: WeightCompanderConfig) -> None:
        super().__init__(base_layer, config)
        w = weight_of(base_layer).detach().float()
        a = config.a * w.abs().max().reshape(1)
        b = a / config.gain
        self._latent = config.transfer == "latent"
        self.wc_weight = nn.Parameter(Compander(a, b).right_inverse(w) if self._latent else w.clone())
        self.wc_a: Tensor
        self.wc_b: Tensor
        for name, value in (("wc_a", a), ("wc_b", b)):
            if config.learnable:
                hidden = inverse_softplus(value) if self._latent else value
                self.register_parameter(name, nn.Parameter(hidden))
            else:
                self.register_buffer(name, value)
        self.wc_bias: nn.Parameter | None = None
        bias = cast("Tensor | None", base_layer.bias)
        if bias is not None:
            self.wc_bias = nn.Parameter(bias.detach().float().clone())
        self._plain_bias: Tensor | None = None
        self._steps: _Coordinates | None = None

    @property
    def compander(self) -> Compander:
        """The function, with the present a and b, differentiable."""
        if self._latent and self.config.learnable:
            return Compander(softplus(self.wc_a), softplus(self.wc_b))
        return Compander(self.wc_a, self.wc_b)

    @property
    def bias(self) -> Tensor | None:
        """The trained bias, or the base layer's while it is merged."""
        return super().bias if self.merged else self.wc_bias

    def trained_weight(self) -> Tensor:
        """Return W, differentiable."""
        return cast(Tensor, self.compander(self.wc_weight)) if self._latent else self.wc_weight

    def saturated_share(self) -> float:
        """Return the share of weights whose latent is beyond 20 b: they hardly move any more."""
        with torch.no_grad():
            bound = math.atan(_SATURATED) * self.compander.a
            return float((self.trained_weight().abs() > bound).float().mean())

    def delta_weight(self) -> Tensor:
        """Return the trained minus the original weight, in the weight's shape."""
        return self.trained_weight() - self.base_weight.float()

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the trained weight itself."""
        return self.trained_weight().to(dtype)

    def adapted(self, x: Tensor) -> Tensor:
        """Return the layer's output with the trained weight and bias."""
        weight = self.trained_weight().to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if isinstance(self.base_layer, nn.Conv2d):
            convolved: Tensor = self.base_layer._conv_forward(x, weight, bias)
            return convolved
        return nn.functional.linear(x, weight, bias)

    def merge(self) -> None:
        """Put weight and bias into the base layer."""
        super().merge()
        if self.wc_bias is not None:
            self._plain_bias = cast(Tensor, self.base_layer.bias)
            self.base_layer.bias = nn.Parameter(self.wc_bias.detach().clone(), requires_grad=False)

    def unmerge(self) -> None:
        """Put the original weight and bias back."""
        super().unmerge()
        if self.wc_bias is not None:
            self.base_layer.bias = cast(Any, self._plain_bias)

    def start_training(self, server_round: int, seed: tuple[int, ...]) -> None:
        """Take the weights that came into latent coordinates."""
        self._steps = None if self._latent else _Coordinates(self)

    def enter_step(self) -> None:
        """Turn weight, a, b and their gradients into the latent ones."""
        if self._steps is not None:
            self._steps.enter()

    def leave_step(self) -> None:
        """Turn the latent weight, a and b back."""
        if self._steps is not None:
            self._steps.leave()

    def end_training(self) -> None:
        """Forget the latent weight; the effective one is what travels."""
        self._steps = None


class _Coordinates:
    """The latent weight of a layer during a local training, and the chain rule to it."""

    def __init__(self, layer: WeightCompander) -> None:
        self._layer = layer
        self._inside = False
        with torch.no_grad():
            # a and b are softplus of what the optimizer sees, so that they stay positive.
            self._shape = [inverse_softplus(p.detach()) for p in (layer.wc_a, layer.wc_b)]
            self._v = layer.compander.right_inverse(layer.wc_weight)

    def enter(self) -> None:
        layer, (a_hat, b_hat) = self._layer, self._shape
        learnable = layer.config.learnable
        with torch.enable_grad():
            v, a_hat, b_hat = (t.detach().requires_grad_() for t in (self._v, a_hat, b_hat))
            a, b = softplus(a_hat), softplus(b_hat)
            w = (Compander(a, b) if learnable else layer.compander)(v)
            outputs, given = [w], [_gradient(layer.wc_weight)]
            if learnable:
                outputs, given = [w, a, b], [*given, _gradient(layer.wc_a), _gradient(layer.wc_b)]
            wanted = [v, a_hat, b_hat] if learnable else [v]
            gradients = torch.autograd.grad(outputs, wanted, given)
        tensors = [layer.wc_weight, layer.wc_a, layer.wc_b][: len(wanted)]
        with torch.no_grad():
            for tensor, latent, gradient in zip(tensors, wanted, gradients, strict=True):
                tensor.copy_(latent)
                _gradient(tensor).copy_(gradient)
        self._inside = True

    def leave(self) -> None:
        if not self._inside:
            return  # The step was not taken by an optimizer; it was one of the weights themselves.
        layer = self._layer
        with torch.no_grad():
            self._v = layer.wc_weight.detach().clone()
            if layer.config.learnable:
                for k, tensor in enumerate((layer.wc_a, layer.wc_b)):
                    self._shape[k] = torch.lerp(self._shape[k], tensor.detach(), layer.config.shape_lr)
                    tensor.copy_(softplus(self._shape[k]))
            layer.wc_weight.copy_(layer.compander(self._v))
        self._inside = False


def _gradient(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return tensor.grad


def inverse_softplus(y: Tensor) -> Tensor:
    """Return x with ``softplus(x) = y``, y > 0."""
    return y + torch.log(-torch.expm1(-y))
