"""AdaLoRA: a rank per layer, chosen in training (Zhang et al., ICLR 2023, arXiv 2303.10512)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from turnout.allocation import AdaLoraAllocator
from turnout.peft.config import AdapterConfig, Aggregation
from turnout.peft.layer import AdapterLayer
from turnout.peft.sensitivity import Sensitivity
from turnout.tasks.training_part import TrainingPart
from turnout.tasks.validation import check_count, check_number
from turnout.wire.registry import register


@register(
    "adalora", kind="adapter", paper="2303.10512", summary="Low-rank change, ranks shared out in training"
)
@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(AdapterConfig):
    """AdaLoRA: ``delta = lora_alpha / init_r * B (A * E)``, least important rows of E set to zero.

    What travels is ``init_r (d_in + d_out + 1)`` numbers per layer, and up a score per triplet, down a mask.
    The update is trilinear: the mean of the factors is not the mean of the updates. Steps are those of the
    whole run, on the server's counter: rounds times ``local_steps``.

    Attributes
    ----------
    init_r
        Rank of every layer at first.
    target_r
        Mean rank at the end; the budget is ``target_r`` times the number of layers.
    lora_alpha
        Numerator of the scale; it is divided by ``init_r`` however many triplets are left. 0 means
        ``init_r``.
    tinit, tfinal, total_step
        Steps before the budget falls, steps at the end with the last mask, steps in all.
    deltaT
        Steps between two allocations.
    beta1, beta2
        Smoothing of sensitivity and of its uncertainty.
    orth_reg_weight
        Weight of the penalty that keeps the rows of A and the columns of B orthonormal: the mean over these
        matrices of ``|| M M^T - I ||_F``.
    init_std
        Standard deviation of the first A and B; E is 0.
    """

    aggregation: ClassVar[Aggregation] = "approximate"

    init_r: int = 12
    target_r: int = 8
    lora_alpha: float = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815 - the name in HF peft
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank("init_r")
        check_count("target_r", self.target_r, low=1)
        check_count("deltaT", self.deltaT, low=1)
        check_number("lora_alpha", self.lora_alpha, low=0)
        check_number("orth_reg_weight", self.orth_reg_weight, low=0)
        check_number("init_std", self.init_std, low=0, open_low=True)
        for field in ("beta1", "beta2"):
            check_number(field, getattr(self, field), low=0, high=1, open_low=True, open_high=True)
        self.allocator()

    @property
    def scale(self) -> float:
        """The factor before ``B (A * E)``; as in the code of the authors and of HF."""
        return (self.lora_alpha or float(self.init_r)) / (self.init_r + 1e-5)

    def allocator(self, local_steps: int | None = 1) -> AdaLoraAllocator:
        """Return what chooses the ranks, for rounds of ``local_steps`` steps."""
        return AdaLoraAllocator(
            init_r=self.init_r,
            target_r=self.target_r,
            tinit=self.tinit,
            tfinal=self.tfinal,
            deltaT=self.deltaT,
            total_step=self.total_step,
            local_steps=local_steps,
        )

    def layers(self, targets: Mapping[str, nn.Module]) -> dict[str, AdapterLayer]:
        """Return the adapters, which share the penalty's mean."""
        made = super().layers(targets)
        for layer in made.values():
            cast(AdaLora, layer).matrices = 2 * len(made)
        return made

    def layer(self, name: str, base_layer: nn.Module, generator: torch.Generator) -> AdaLora:
        """Return the adapter of ``base_layer``."""
        return AdaLora(base_layer, self, generator)


class AdaLora(AdapterLayer, TrainingPart):
    """A linear layer with trained ``lora_A`` (r, d_in), ``lora_B`` (d_out, r) and ``lora_E`` (r, 1).

    ``rank_mask`` (r,) is the server's last word on which triplets are left, ``running_importance`` (r,) the
    client's score of each.
    """

    config: AdaLoraConfig
    travelling_names = ("rank_mask", "running_importance")
    stackable = False

    def __init__(self, base_layer: nn.Module, config: AdaLoraConfig, generator: torch.Generator) -> None:
        super().__init__(base_layer, config)
        r, std = config.init_r, config.init_std
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features).normal_(std=std, generator=generator))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r).normal_(std=std, generator=generator))
        self.lora_E = nn.Parameter(torch.zeros(r, 1))
        self.rank_mask: Tensor
        self.running_importance: Tensor
        self.register_buffer("rank_mask", torch.ones(r, dtype=torch.uint8))
        self.register_buffer("running_importance", torch.zeros(r))
        self.matrices = 2
        self._sensitivities: list[Sensitivity] = []

    @property
    def singular_values(self) -> Tensor:
        """E with what the mask forbids at 0, shape (r, 1)."""
        return self.lora_E * self.rank_mask[:, None]

    def kept(self) -> Tensor:
        """Return which triplets are alive at present, a boolean vector (r,)."""
        return self.singular_values.detach()[:, 0] != 0

    def delta_weight(self) -> Tensor:
        """Return ``s B (A * E)``."""
        return self.config.scale * (self.lora_B @ (self.lora_A * self.singular_values))

    def adapted(self, x: Tensor) -> Tensor:
        """Return the base layer's output plus ``s B ((A * E) x)``, without the dense weight."""
        base: Tensor = self.base_layer(x)
        branch = linear(linear(x.to(self.lora_A.dtype), self.lora_A * self.singular_values), self.lora_B)
        return base + (self.config.scale * branch).to(base.dtype)

    def start_training(self, server_round: int, seed: tuple[int, ...]) -> None:
        """Collect scores anew."""
        self._sensitivities = [
            Sensitivity(tensor, self.config.beta1, self.config.beta2)
            for tensor in (self.lora_A, self.lora_B, self.lora_E)
        ]

    def penalty(self) -> Tensor | None:
        """Return this layer's part of the orthogonality penalty."""
        if not self.config.orth_reg_weight:
            return None
        total = sum(
            torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device))
            for gram in (self.lora_A @ self.lora_A.T, self.lora_B.T @ self.lora_B)
        )
        return cast(Tensor, total) * (self.config.orth_reg_weight / self.matrices)

    def after_gradient(self) -> None:
        """Take the step's gradients into the scores."""
        for sensitivity, tensor in zip(
            self._sensitivities, (self.lora_A, self.lora_B, self.lora_E), strict=False
        ):
            sensitivity.update(tensor, tensor.grad)

    def report(self) -> None:
        """Write the triplets' scores: that of the singular value plus the means of its two vectors'."""
        a, b, e = (sensitivity.score() for sensitivity in self._sensitivities)
        self.running_importance.copy_(e[:, 0] + a.mean(dim=1) + b.mean(dim=0))

    def end_training(self) -> None:
        """Write the scores for the server."""
        self.report()
        self._sensitivities = []
