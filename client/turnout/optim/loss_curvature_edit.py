"""Curvature statistics of a model's layers, and the weight edit that they guide (arXiv 2510.24256).

The loss's curvature in a weight W (out x in) is approximated as ``G (x) A`` (K-FAC): ``A = E[a a^T]`` over
the layer's inputs, ``G = E[g g^T]`` over the loss's gradients at its outputs. The edit keeps the part of W in
directions of high curvature, which many examples share, and drops the rest, where memorised ones live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from turnout.tasks.validation import check_number
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register

Labels = Literal["dataset", "sampled", "expected"]
LABELS: Final = ("dataset", "sampled", "expected")
Loss = Callable[[Tensor, Tensor], Tensor]
Editable = nn.Linear | nn.Conv2d


@dataclass(frozen=True, slots=True)
class LayerCurvature:
    """Sums over ``count`` examples: ``inputs`` of a a^T (n, n), ``gradients`` of g g^T (m, m), float64."""

    inputs: Tensor
    gradients: Tensor
    count: int


def editable_layers(module: nn.Module) -> dict[str, Editable]:
    """Return the layers whose weights can be edited, by name: linear ones and ungrouped 2-d convolutions."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


def collect_curvature(
    module: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss,
    layers: Sequence[str],
    *,
    labels: Labels = "dataset",
    generator: torch.Generator | None = None,
) -> dict[str, LayerCurvature]:
    """Return the sums of each of ``layers`` over ``batches``, with ``module`` in evaluation mode.

    ``loss(output, y)`` is a mean over the elements of y; gradients are taken of the sum, so that the size of
    a batch does not matter. ``labels``: those of the data; ``"sampled"`` from the model's softmax (drawn by
    ``generator``); or ``"expected"``, the exact mean over all classes. Interpolating models nearly always
    sample what they predict, so that few accidents make up G: use one of the other two for them.

    Raises `ConfigError` for a layer that is not there or cannot be edited, and for unknown labels.
    """
    known = editable_layers(module)
    for name in layers:
        if name not in known:
            raise ConfigError(
                f"layers: {name!r} cannot be edited; this model has {', '.join(known) or 'no such layer'}."
            )
    if labels not in LABELS:
        raise ConfigError(f"labels={labels!r} is not possible; use one of {', '.join(LABELS)}.")
    sums = {name: _zeros(known[name].weight) for name in layers}
    count = 0
    with _evaluating(module), _taps({name: known[name] for name in layers}) as taps, torch.enable_grad():
        for x, y in batches:
            taps.clear()
            output = module(x)
            count += len(y)
            names = [name for name, _, _ in taps]
            heads = [head for _, _, head in taps]
            for name, inputs, _ in taps:
                _add(sums[name][0], _input_rows(known[name], inputs.detach()))
            for target, weight in _targets(output, y, labels, generator):
                total = loss(output, target) * target.numel()
                gradients = torch.autograd.grad(total, heads, retain_graph=True, allow_unused=True)
                for name, gradient in zip(names, gradients, strict=True):
                    if gradient is not None:
                        _add(sums[name][1], _output_rows(gradient), weight)
    return {name: LayerCurvature(inputs, gradients, count) for name, (inputs, gradients) in sums.items()}


@register("loss-curvature-edit", kind="weight-edit", paper="2510.24256")
@torch.no_grad()
def edit_(module: nn.Module, curvature: Mapping[str, LayerCurvature], rho: float) -> dict[str, Tensor]:
    """Edit the layers in ``curvature`` in place and return their original weights (see `restore_`).

    Each weight keeps the components of highest curvature that make up the share ``rho`` of its layer's
    curvature; 1 keeps the weight, 0 drops it. Biases stay. Optimizer moments of the layers mean nothing
    afterwards: reset them. Raises `ConfigError`, before any weight changes, for a layer that is not there and
    for curvature that is not this layer's or not finite.
    """
    check_number("rho", rho, low=0, high=1)
    layers = editable_layers(module)
    for name, sums in curvature.items():
        _check(name, layers.get(name), sums)
    originals = {}
    for name, sums in curvature.items():
        weight = layers[name].weight
        originals[name] = weight.detach().clone()
        matrix = weight.reshape(weight.shape[0], -1).to(sums.inputs)
        weight.copy_(_edited(matrix, sums.inputs, sums.gradients, rho).reshape(weight.shape))
    return originals


@torch.no_grad()
def restore_(module: nn.Module, originals: Mapping[str, Tensor]) -> None:
    """Put the weights back that `edit_` returned."""
    layers = editable_layers(module)
    for name, weight in originals.items():
        layers[name].weight.copy_(weight)


def _edited(weight: Tensor, inputs: Tensor, gradients: Tensor, rho: float) -> Tensor:
    if rho == 1:
        return weight
    a, basis_a = torch.linalg.eigh(inputs)
    g, basis_g = torch.linalg.eigh(gradients)
    mass = torch.outer(g.clamp_min(0).flip(0), a.clamp_min(0).flip(0))
    basis_a, basis_g = basis_a.flip(1), basis_g.flip(1)
    order = torch.argsort(mass.reshape(-1), descending=True, stable=True)
    reached = torch.cumsum(mass.reshape(-1)[order], 0)
    kept = int((reached < rho * reached[-1]).sum()) + 1 if rho > 0 else 0
    mask = torch.zeros_like(mass).reshape(-1)
    mask[order[:kept]] = 1
    coefficients = (basis_g.T @ weight @ basis_a) * mask.reshape(mass.shape)
    edited: Tensor = basis_g @ coefficients @ basis_a.T
    return edited


def _check(name: str, layer: Editable | None, sums: LayerCurvature) -> None:
    """Raise `ConfigError` unless ``sums`` can be the curvature of ``layer``."""
    if layer is None:
        raise ConfigError(f"curvature of {name!r}: this model has no such layer that can be edited.")
    m, n = layer.weight.shape[0], layer.weight[0].numel()
    shapes = (tuple(sums.inputs.shape), tuple(sums.gradients.shape))
    if shapes != ((n, n), (m, m)):
        raise ConfigError(f"curvature of {name!r} has shapes {shapes}, its weight needs {((n, n), (m, m))}.")
    if not (sums.inputs.isfinite().all() and sums.gradients.isfinite().all()):
        raise ConfigError(f"curvature of {name!r} is not finite; collect it with finite weights and inputs.")


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put ``module`` in evaluation mode, and each of its parts back into its own after that."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _taps(layers: Mapping[str, Editable]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Collect (name, input, output) of every call of ``layers``; a layer called twice comes twice."""
    found: list[tuple[str, Tensor, Tensor]] = []

    def tap(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:  # A frozen model: its outputs are where the gradient ends.
                output.requires_grad_()
            found.append((name, inputs[0], output))

        return hook

    handles = [layer.register_forward_hook(tap(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _targets(
    output: Tensor, y: Tensor, labels: Labels, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the labels to take gradients for, with each example's weight (None: 1)."""
    if labels == "dataset":
        yield y, None
        return
    if output.dim() != 2:
        raise ConfigError(f"labels={labels!r} needs outputs (examples, classes); use labels='dataset'.")
    chances = output.detach().softmax(dim=1)
    if labels == "sampled":
        yield torch.multinomial(chances, 1, generator=generator).squeeze(1), None
        return
    for label in range(output.shape[1]):
        yield torch.full_like(y, label), chances[:, label]


def _input_rows(layer: Editable, inputs: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    if isinstance(layer.padding, str):
        raise ConfigError(
            f"layers: a convolution with padding={layer.padding!r} cannot be edited; give a number."
        )
    patches = unfold(
        inputs, layer.kernel_size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride
    )  # fmt: skip
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _output_rows(gradient: Tensor) -> Tensor:
    if gradient.dim() == 4:  # A convolution's: each position counts as a sample.
        gradient = gradient.permute(0, 2, 3, 1)
    return gradient.reshape(-1, gradient.shape[-1])


def _zeros(weight: Tensor) -> tuple[Tensor, Tensor]:
    sizes = (weight[0].numel(), weight.shape[0])
    a, g = (torch.zeros(n, n, dtype=torch.float64, device=weight.device) for n in sizes)
    return a, g


def _add(total: Tensor, rows: Tensor, weight: Tensor | None = None) -> None:
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()  # Their products would be rounded to three digits.
    weighted = rows
    if weight is not None:  # One for each example, whose rows lie together.
        weighted = rows * weight.repeat_interleave(len(rows) // len(weight))[:, None]
    total += (weighted.T @ rows).double()
