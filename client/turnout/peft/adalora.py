"""AdaLoRA: a rank per layer, chosen in training (Zhang et al., ICLR 2023, arXiv 2303.10512)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from turnout.allocation import AdaLoraAllocator, LowRankForm, Sides
from turnout.allocation.adalora import TRIPLETS
from turnout.peft.config import AdapterConfig, check_averaging
from turnout.peft.layer import AdapterLayer
from turnout.peft.seeded_dropout import dropping
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
    In the last phase, where the mask is fixed, replies have the triplets that are left only. The update is
    trilinear: the mean of the factors is not the mean of the updates. Steps are those of the whole run, on
    the server's counter: rounds times ``local_steps``.

    Attributes
    ----------
    aggregation
        "approximate" averages the factors. "exact-svd" averages the dense updates ``s B (A * E)``, with
        whichever rule the strategy has, and sends the triplets of the result's singular value decomposition:
        of every layer as many of the largest as it has among the best scored. Costs the server memory for
        dense layers and an SVD of each in every round.
    init_r
        Rank of every layer at first.
    target_r
        Mean rank at the end; the budget is ``target_r`` times the number of layers.
    lora_alpha
        Numerator of the scale; it is divided by ``init_r`` however many triplets are left. 0 means
        ``init_r``.
    lora_dropout
        Probability with which an input of A is dropped in a training step, as in `LoraConfig`.
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

    aggregation: Literal["approximate", "exact-svd"] = "approximate"  # type: ignore[misc]

    init_r: int = 12
    target_r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
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
        check_number("lora_dropout", self.lora_dropout, low=0, high=1, open_high=True)
        check_number("orth_reg_weight", self.orth_reg_weight, low=0)
        check_number("init_std", self.init_std, low=0, open_low=True)
        for field in ("beta1", "beta2"):
            check_number(field, getattr(self, field), low=0, high=1, open_low=True, open_high=True)
        check_averaging(self.aggregation, "exact-svd")
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
            largest=self.aggregation == "exact-svd",
        )

    @property
    def dense_form(self) -> LowRankForm | None:  # type: ignore[override]
        """The factors' names and the scale, if the server averages dense updates."""
        return LowRankForm((tuple(TRIPLETS),), self.scale) if self.aggregation == "exact-svd" else None

    def layers(self, targets: Mapping[str, nn.Module]) -> dict[str, AdapterLayer]:
        """Return the adapters, which share the penalty's mean."""
        made = super().layers(targets)
        for layer in made.values():
            cast(AdaLora, layer).matrices = 2 * len(made)
        return made

    def layer(self, name: str, base_layer: nn.Module, generator: torch.Generator) -> AdaLora:
        """Return the adapter of ``base_layer``."""
        return AdaLora(base_layer, self, generator, name)


class AdaLora(AdapterLayer, TrainingPart):
    """A linear layer with trained ``lora_A`` (r, d_in), ``lora_B`` (d_out, r) and ``lora_E`` (r, 1).

    ``rank_mask`` (r,) is the server's last word on which triplets are left, ``running_importance`` (r,) the
    client's score of each.
    """

    config: AdaLoraConfig
    narrows: ClassVar[Sides] = TRIPLETS
    travelling_names = ("rank_mask", "running_importance")
    stackable = False

    def __init__(
        self, base_layer: nn.Module, config: AdaLoraConfig, generator: torch.Generator, name: str = ""
    ) -> None:
        super().__init__(base_layer, config)
        self.lora_dropout = dropping(config.lora_dropout, name)
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
        self._begun: list[Tensor] = []

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
        inner = linear(self.lora_dropout(x.to(self.lora_A.dtype)), self.lora_A * self.singular_values)
        branch = linear(inner, self.lora_B)
        return base + (self.config.scale * branch).to(base.dtype)

    def start_training(self, server_round: int, seed: tuple[int, ...]) -> None:
        """Collect scores anew, and keep what the mask drops."""
        self._begun = [tensor.detach().clone() for tensor in self._triplets()]
        self._sensitivities = [
            Sensitivity(tensor, self.config.beta1, self.config.beta2) for tensor in self._triplets()
        ]

    def _triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.lora_A, self.lora_B, self.lora_E

    def penalty(self) -> Tensor | None:
        """Return this layer's part of the orthogonality penalty, of the triplets that the mask leaves."""
        left = self.rank_mask.bool()
        if not self.config.orth_reg_weight or not left.any():
            return None
        a, b = self.lora_A[left], self.lora_B[:, left]
        total = sum(
            torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device))
            for gram in (a @ a.T, b.T @ b)
        )
        return cast(Tensor, total) * (self.config.orth_reg_weight / self.matrices)

    def after_gradient(self) -> None:
        """Take the step's gradients into the scores."""
        for sensitivity, tensor in zip(self._sensitivities, self._triplets(), strict=False):
            sensitivity.update(tensor, tensor.grad)

    def report(self) -> None:
        """Write the triplets' scores: that of the singular value plus the means of its two vectors'."""
        a, b, e = (sensitivity.score() for sensitivity in self._sensitivities)
        self.running_importance.copy_(e[:, 0] + a.mean(dim=1) + b.mean(dim=0))

    def end_training(self) -> None:
        """Write the scores for the server; put back what the mask drops, whatever decay did to it."""
        self.report()
        left = self.rank_mask.bool()
        with torch.no_grad():
            for tensor, begun, side in zip(
                self._triplets(), self._begun, (left[:, None], left, left[:, None]), strict=True
            ):
                tensor.copy_(torch.where(side, tensor, begun))
        self._sensitivities, self._begun = [], []
