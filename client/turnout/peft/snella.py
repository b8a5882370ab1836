"""SNELLA: a kernel of two thin matrices, made sparse (arXiv 2510.24037, on SNELL, arXiv 2411.01800).

The kernel and the sparsifier are those of the authors' code; the paper's abstract describes them in general.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from turnout.allocation import KernelForm, SnellaAllocator
from turnout.peft.config import AdapterConfig, check_averaging
from turnout.peft.layer import AdapterLayer
from turnout.peft.sensitivity import Sensitivity
from turnout.tasks.training_part import TrainingPart
from turnout.tasks.validation import check_count, check_number
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register

_SMALLEST_GAMMA = 1e-3


@register(
    "snella", kind="adapter", paper="2510.24037", summary="Sparse change from a kernel of thin matrices"
)
@dataclass(frozen=True, kw_only=True)
class SnellaConfig(AdapterConfig):
    """SNELLA: ``K = sum_h +-c |In_h,i - Out_h,o|``, entries small in size dropped, the others squared.

    What travels is r (d_in + d_out) + 3 numbers per layer, and up a score, down the number of non-zeros of
    each layer. Distances are not linear: the mean of the factors is not the mean of the updates. At first the
    update is small, not zero. Steps are those of the whole run, on the server's counter.

    Attributes
    ----------
    r
        Columns of the thin matrices, over all kernels.
    num_kernels
        H; their signs alternate. Divides ``r``.
    kernel_scale
        The factor c.
    competition
        Add ``alpha softmax(K / gamma) + beta`` over each input's outputs, with trained scalars; without it
        this is SNELL.
    init_sparsity, target_sparsity
        Share of zeros over all layers at first and at the end.
    tinit, tfinal, total_step
        Steps before the budget falls, steps at the end with the last shares, steps in all.
    deltaT
        Steps between two allocations.
    beta1, beta2
        Smoothing of sensitivity and of its uncertainty.
    checkpointing
        Build the dense update again in backward, not keep it.
    aggregation
        "approximate" averages the thin matrices. "exact-fold" averages the sparse updates, with whichever
        rule the strategy has: their mean becomes part of the weight, in a dense tensor ``folded`` that
        travels down, and the matrices start again from their first values in every round. Replies are as
        without it. Then the update is zero at first. Clients have a dense matrix per layer, and so does
        their optimizer's state. Not for ADMM, whose clients keep models of their own.
    """

    aggregation: Literal["approximate", "exact-fold"] = "approximate"  # type: ignore[misc]

    r: int = 32
    num_kernels: int = 2
    kernel_scale: float = 0.1
    competition: bool = True
    init_sparsity: float = 0.0
    target_sparsity: float = 0.3
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815 - AdaLoRA's name in HF peft
    beta1: float = 0.85
    beta2: float = 0.85
    total_step: int
    checkpointing: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank()
        check_count("num_kernels", self.num_kernels, low=1)
        if self.r % self.num_kernels:
            raise ConfigError(
                f"num_kernels={self.num_kernels} does not divide r={self.r}; each kernel has r / num_kernels "
                "columns."
            )
        check_number("kernel_scale", self.kernel_scale, low=0, open_low=True)
        check_count("deltaT", self.deltaT, low=1)
        for field in ("init_sparsity", "target_sparsity"):
            check_number(field, getattr(self, field), low=0, high=1, open_high=True)
        for field in ("beta1", "beta2"):
            check_number(field, getattr(self, field), low=0, high=1, open_low=True, open_high=True)
        check_averaging(self.aggregation, "exact-fold")
        self.allocator()

    @property
    def dense_form(self) -> KernelForm | None:  # type: ignore[override]
        """The kernels' scale, if the server averages dense updates."""
        return KernelForm(self.kernel_scale) if self.aggregation == "exact-fold" else None

    def allocator(self, local_steps: int | None = 1) -> SnellaAllocator:
        """Return what shares out the non-zeros, for rounds of ``local_steps`` steps."""
        return SnellaAllocator(
            init_sparsity=self.init_sparsity,
            target_sparsity=self.target_sparsity,
            tinit=self.tinit,
            tfinal=self.tfinal,
            deltaT=self.deltaT,
            total_step=self.total_step,
            local_steps=local_steps,
        )

    def layer(self, name: str, base_layer: nn.Module, generator: torch.Generator) -> Snella:
        """Return the adapter of ``base_layer``."""
        return Snella(base_layer, self, generator)


class Snella(AdapterLayer, TrainingPart):
    """A linear layer with ``In_Qs`` (H, d_in, r/H), ``Out_Qs`` (H, d_out, r/H) and scalars alpha, gamma,
    beta.

    ``num_kept`` (1,) is how many entries of the update may be non-zero, ``running_importance`` (1,) the
    client's score of the layer. With "exact-fold", ``folded`` (d_out, d_in) is the mean change of all rounds
    before, less what the kernel adds as it starts; it travels, and no step changes it.
    """

    config: SnellaConfig
    stackable = False

    def __init__(self, base_layer: nn.Module, config: SnellaConfig, generator: torch.Generator) -> None:
        super().__init__(base_layer, config)
        heads, width = config.num_kernels, config.r // config.num_kernels

        def drawn(side: int) -> nn.Parameter:
            bound = 1 / math.sqrt(side * width)
            return nn.Parameter(torch.empty(heads, side, width).uniform_(-bound, bound, generator=generator))

        self.In_Qs = drawn(self.in_features)
        self.Out_Qs = drawn(self.out_features)
        if config.competition:
            self.alpha = nn.Parameter(torch.ones(1))
            self.gamma = nn.Parameter(torch.ones(1))
            self.beta = nn.Parameter(torch.zeros(1))
        entries = self.in_features * self.out_features
        kept = min(entries, round((1 - config.init_sparsity) * entries))
        self.num_kept: Tensor
        self.running_importance: Tensor
        self.register_buffer("num_kept", torch.tensor([kept]))
        self.register_buffer("running_importance", torch.zeros(1))
        self._sensitivities: list[Sensitivity] = []
        self._held: Tensor | None = None
        if config.aggregation == "exact-fold":
            with torch.no_grad():
                start = -self._sparse(*self.factors).contiguous()
            self.folded = nn.Parameter(start, requires_grad=False)

    @property
    def travelling_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """What travels beside what is trained."""
        folded = ("folded",) if self.config.aggregation == "exact-fold" else ()
        return ("num_kept", "running_importance", *folded)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The trained tensors, in the order in which `kernel` takes them."""
        pair = (self.In_Qs, self.Out_Qs)
        return (*pair, self.alpha, self.gamma, self.beta) if self.config.competition else pair

    def kernel(self) -> Tensor:
        """Return K, shape (d_in, d_out)."""
        return kernel(self.config.kernel_scale, *self.factors)

    def delta_weight(self) -> Tensor:
        """Return ``(K * n)^T`` with n the size of the entries kept, a constant to the gradient.

        Plus what is folded into the weight.
        """
        return self._delta(*self.factors)

    def adapted(self, x: Tensor) -> Tensor:
        """Return the base layer's output plus ``x (K * n)``; the dense steps are done again in backward."""
        base: Tensor = self.base_layer(x)
        inputs = (x.to(self.In_Qs.dtype), *self.factors)
        rebuild = self.config.checkpointing and torch.is_grad_enabled()
        branch: Tensor = (
            cast(Any, _Rebuilt).apply(self._branch, *inputs) if rebuild else self._branch(*inputs)
        )
        return base + branch.to(base.dtype)

    def _delta(self, *factors: Tensor) -> Tensor:
        sparse = self._sparse(*factors)
        return self.folded + sparse if self.config.aggregation == "exact-fold" else sparse

    def _sparse(self, *factors: Tensor) -> Tensor:
        return sparse_square(kernel(self.config.kernel_scale, *factors), int(self.num_kept)).T

    def _branch(self, x: Tensor, *factors: Tensor) -> Tensor:
        return linear(x, self._delta(*factors))

    def start_training(self, server_round: int, seed: tuple[int, ...]) -> None:
        """Collect scores anew, and keep what no step may change."""
        if self.config.aggregation == "exact-fold":
            self._held = self.folded.detach().clone()
        self._sensitivities = [
            Sensitivity(tensor, self.config.beta1, self.config.beta2) for tensor in (self.In_Qs, self.Out_Qs)
        ]

    def leave_step(self) -> None:
        """Put back what is folded into the weight, whatever decay did to it."""
        if self._held is not None:
            self.folded.copy_(self._held)

    def after_gradient(self) -> None:
        """Take the step's gradients into the scores."""
        for sensitivity, tensor in zip(self._sensitivities, (self.In_Qs, self.Out_Qs), strict=False):
            sensitivity.update(tensor, tensor.grad)

    def report(self) -> None:
        """Write the layer's score: the mean over either matrix, added."""
        self.running_importance.fill_(sum(float(s.score().mean()) for s in self._sensitivities))

    def end_training(self) -> None:
        """Write the score for the server."""
        self.report()
        self._sensitivities, self._held = [], None


def kernel(scale: float, inner: Tensor, outer: Tensor, *competition: Tensor) -> Tensor:
    """Return K, shape (d_in, d_out), of ``inner`` (H, d_in, q) and ``outer`` (H, d_out, q).

    ``competition`` is (alpha, gamma, beta), or nothing.
    """
    # Exact distances: the matrix form of small ones is mostly rounding.
    distances = torch.cdist(inner, outer, compute_mode="donot_use_mm_for_euclid_dist")
    signs = torch.tensor([(-1.0) ** h for h in range(len(distances))], device=distances.device)
    k: Tensor = scale * torch.tensordot(signs, distances, dims=1)
    if competition:
        alpha, gamma, beta = competition
        gamma = torch.where(gamma.abs() < _SMALLEST_GAMMA, _SMALLEST_GAMMA, gamma)
        k = k + alpha * torch.softmax(k / gamma, dim=-1) + beta
    return k


def sparse_square(k: Tensor, kept: int) -> Tensor:
    """Return ``K |K|`` at the ``kept`` largest entries of K in size, else 0; its derivative is |K| there.

    Of entries that tie at the limit none is kept.
    """
    size = k.detach().abs()
    if kept < size.numel():
        limit = size.reshape(-1).kthvalue(size.numel() - kept).values
        size = torch.where(size > limit, size, 0.0)
    return k * size


class _Rebuilt(torch.autograd.Function):
    """Calls a function of tensors; of its steps nothing is kept for backward, which takes them again."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            tensors = [
                tensor.detach().requires_grad_(wanted)
                for tensor, wanted in zip(ctx.saved_tensors, needed, strict=True)
            ]
            output = ctx.function(*tensors)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, gradients[0]))
        return (None, *(next(found) if tensor.requires_grad else None for tensor in tensors))
