"""ECO: training on quantized weights without a full-precision copy of them (arXiv 2601.22101).

After each step the weights are rounded to their grid, and what rounding took is put into the momentum, so
that the next steps repay it exactly once. With wanted weights W~ = a W - eta M~, a = 1 - eta lambda:

    W = q(W~);  E = W~ - W;  M = M~ + alpha E,  alpha = (1/eta)(1 - a / beta)

Then z = W - c M, c = eta beta / (a - beta), moves as unrounded weights would, for any rounding (with
lambda = 0, z - eta G each step). Weights are grid values in the parameter's own dtype, or, in layers of
`turnout.optim.coded_layers`, codes of a byte each. The coefficient is derived from that law, and Adam's form
from putting the per-coordinate step eta / ((1 - beta_1^t)(sqrt(v_hat) + eps)) for eta: the paper's own
listing was not seen.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final, Literal

import numpy as np
import torch
from flwr.app import Array
from torch import Tensor, nn

from turnout.optim.adam import adam_moments, adam_state, check_betas
from turnout.optim.base import (
    Group,
    ModuleOptimizer,
    StatePolicy,
    gradient_of,
    in_turn,
    step_count,
    zeros_for,
)
from turnout.optim.coded_layers import handles, store, weights_of
from turnout.optim.momentum_step import MomentumStep
from turnout.optim.quantizers import Quantizer, quantizer_of
from turnout.tasks.validation import check_count, check_number
from turnout.wire.arrays import NDArray, view
from turnout.wire.errors import ConfigError, unknown_name
from turnout.wire.registry import register

Rounding = Literal["sr", "rtn"]

_FIRST: Final = "exp_avg"
_SECOND: Final = "exp_avg_sq"
_SCALE: Final = "scale"
_RNG: Final = "rng_state"


class _ECO(ModuleOptimizer):
    """What both forms share: rounding and its generator, rounds.

    Matrices are on the grid; parameters of fewer dimensions get the ordinary update (for `for_module`,
    embeddings and the output layer too). A group may say with ``eco=True`` or ``False``.

    Parameters
    ----------
    params
        Parameters, or groups with settings of their own.
    lr
        eta.
    weight_decay
        Decoupled.
    quantizer
        "int2" to "int8", "fp8" (e4m3), both under an absmax scale, or a number: the step of a fixed grid. In
        Python also a `Quantizer`.
    rounding
        "sr" (stochastic, unbiased) or "rtn" (to nearest).
    block
        Entries that share a scale; None is one scale per row.
    error_feedback
        Put the rounding error into the momentum; without it this is naive rounding, for comparison.
    staleness
        rho: kept momentum is multiplied by it for each round that a client missed.
    seed
        Seeds stochastic rounding.
    generator
        Used instead, if given; its device must be the parameters'.
    foreach
        One kernel for all tensors of a group where that is possible; None decides by device.
    """

    split_key: ClassVar[tuple[str, Any, Any]] = ("eco", True, False)
    group_state: ClassVar[tuple[str, ...]] = (_RNG,)
    own: ClassVar[tuple[str, ...]] = ("_generator",)
    seeding: ClassVar[Literal["client"]] = "client"

    def __init__(
        self, params: Iterable[Any], defaults: Group, seed: int, generator: torch.Generator | None
    ) -> None:
        check_count("seed", seed, low=0)
        super().__init__(params, {**defaults, "frozen_scales": False})
        device = self.param_groups[0]["params"][0].device
        if generator is None and device.type != "meta":
            generator = torch.Generator(device).manual_seed(seed)
        self._generator = generator

    @classmethod
    def module_groups(cls, module: nn.Module, options: Mapping[str, Any]) -> list[Group]:
        """Return the parameter groups of ``module``: if it has coded layers, the method is for them alone."""
        coded = handles(module)
        if not coded:
            return super().module_groups(module, options)
        rest = [p for p in module.parameters() if p.requires_grad]
        groups: list[Group] = [{"params": coded, "eco": True}, {"params": rest, "eco": False}]
        return [group for group in groups if group["params"]]

    @classmethod
    def advise(cls, policy: StatePolicy, options: Mapping[str, Any], local_steps: int | None) -> str | None:
        """Refuse to reset with rounding to nearest, warn with stochastic rounding."""
        if policy != "reset":
            return None
        lost = "optimizer_state='reset' loses the rounding error that the momentum is still to repay"
        if options.get("rounding", "sr") == "rtn":
            raise ConfigError(
                f"{lost}, and with rounding='rtn' most small updates vanish; use optimizer_state='keep' or "
                "'send', or rounding='sr'."
            )
        return f"{lost}, and the momentum itself; 'keep' makes it error feedback, 'send' is exact."

    def check_group(self, group: Group) -> None:
        """Check the hyperparameters, and make a quantizer of its name."""
        super().check_group(group)
        check_number("weight_decay", group["weight_decay"], low=0)
        check_number("staleness", group["staleness"], low=0, high=1)
        if group["rounding"] not in ("sr", "rtn"):
            raise unknown_name("rounding", str(group["rounding"]), ("sr", "rtn"))
        quantizer_of(group["quantizer"], group["block"])

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the rounding generator's in the first group."""
        tree = super().state_dict()
        if self._generator is not None:
            tree["param_groups"][0][_RNG] = self._generator.get_state()
        return tree

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, the generator's included."""
        first, *others = state_dict["param_groups"]
        rest = {key: value for key, value in first.items() if key != _RNG}
        super().load_state_dict({**state_dict, "param_groups": [rest, *others]})
        if self._generator is not None and _RNG in first:
            self._generator.set_state(first[_RNG].cpu().to(torch.uint8))

    def freeze_scales(self, frozen: bool = True) -> None:
        """Keep (or, with False, fit anew at each step) the scales that the grids have now."""
        for group in self.param_groups:
            group["frozen_scales"] = frozen

    def _round(self, group: Group, p: Tensor, wanted: Tensor) -> Tensor:
        """Put ``wanted``, rounded, into ``p``; return what rounding took.

        What lies beyond a frozen grid's end is cut off and not returned: it would pile up.
        """
        quantizer: Quantizer = quantizer_of(group["quantizer"], group["block"])
        scale = self.state[p].get(_SCALE) if group["frozen_scales"] else None
        if scale is None:
            scale = quantizer.scale(wanted)
        limit = quantizer.limit(scale)
        if limit is not None:
            wanted = wanted.clamp(-limit, limit)
        noise = None
        if group["rounding"] == "sr":
            noise = torch.rand(
                wanted.shape, dtype=wanted.dtype, device=wanted.device, generator=self._generator
            )
        rounded = quantizer.round(wanted, scale, noise)
        if scale is not None:
            self.state[p][_SCALE] = scale
        store(p, rounded, scale, quantizer)
        return wanted - rounded

    @torch.no_grad()
    def begin_round(self, missed_rounds: int = 0, steps: int = 1) -> None:
        """Put received weights onto the grid, what that takes into the momentum; fade stale momentum first.

        z stays, so that what a client sends over the rounds plus what its momentum still holds is the sum of
        its gradients' steps.
        """
        for group in self.param_groups:
            for p in group["params"] if group["eco"] else ():
                if not p.numel():
                    continue
                state = self.state[p]
                if missed_rounds and _FIRST in state:
                    state[_FIRST].mul_(group["staleness"] ** missed_rounds)
                error = self._round(group, p, weights_of(p))
                repays = group["error_feedback"] and group["lr"] > 0
                if repays and (step := self._next_step(group, p)) is not None:
                    step.repay(state[_FIRST], error, _coefficient(group, self._beta(group)))

    @classmethod
    def check_coding(cls, options: Mapping[str, Any]) -> None:
        """Every grid has codes."""

    def coded(self, parameter: Tensor, old: NDArray) -> Array | None:
        """Return codes and scales of weights on the grid: a byte a weight, less for fewer bits than 8."""
        group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
        if not group["eco"] or not parameter.numel():
            return None
        quantizer: Quantizer = quantizer_of(group["quantizer"], group["block"])
        array = quantizer.travelling(parameter.detach(), self.state[parameter].get(_SCALE))
        if array is None or not np.array_equal(view(array), parameter.detach().cpu().numpy()):
            return None  # Something else has moved them off the grid, as adapters do that put weights back.
        return array

    def update(self, group: Group, params: list[Tensor]) -> None:
        """Take one step."""
        a = 1.0 - group["lr"] * group["weight_decay"]
        for some in in_turn(params, group["foreach"]):
            steps = self._advance(group, some)
            if group["lr"] == 0:
                continue
            for p, step in zip(some, steps, strict=True):
                W, M = weights_of(p), self.state[p][_FIRST]
                wanted = step.taken(W if a == 1.0 else W * a, M)
                if not group["eco"]:
                    p.copy_(wanted)
                    continue
                error = self._round(group, p, wanted)
                if group["error_feedback"]:
                    step.repay(M, error, _coefficient(group, self._beta(group)))

    @abstractmethod
    def _beta(self, group: Group) -> float:
        """Return the momentum's beta."""

    @abstractmethod
    def _advance(self, group: Group, params: list[Tensor]) -> list[MomentumStep]:
        """Advance the momenta by the gradients; return the steps to take with them."""

    @abstractmethod
    def _next_step(self, group: Group, p: Tensor) -> MomentumStep | None:
        """Return how the momentum as it is would move ``p``; None while no step's size is known."""


def _coefficient(group: Group, beta: float) -> float:
    """Return ``1 - a / beta``."""
    a = 1.0 - group["lr"] * group["weight_decay"]
    return float(1.0 - a / beta)


@register("eco-sgd", kind="optimizer", paper="2601.22101")
class ECOSGD(_ECO):
    """Momentum SGD on quantized weights, without a full-precision copy (ECO).

    Parameters
    ----------
    momentum
        beta, above 0: the momentum is what carries the error.
    ema
        Momentum is ``beta M + (1 - beta) G``; without, ``beta M + G``.
    """

    carried: ClassVar[tuple[str, ...]] = (_FIRST,)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        quantizer: str | float | Quantizer = "int8",
        rounding: Rounding = "sr",
        block: int | None = None,
        ema: bool = True,
        error_feedback: bool = True,
        staleness: float = 1.0,
        seed: int = 0,
        generator: torch.Generator | None = None,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "quantizer": quantizer,
            "rounding": rounding,
            "block": block,
            "ema": ema,
            "error_feedback": error_feedback,
            "staleness": staleness,
            "foreach": foreach,
        }
        super().__init__(params, defaults, seed, generator)

    def check_group(self, group: Group) -> None:
        """Check the hyperparameters."""
        super().check_group(group)
        check_number("momentum", group["momentum"], low=0, high=1, open_low=True, open_high=True)

    def _beta(self, group: Group) -> float:
        return float(group["momentum"])

    def _advance(self, group: Group, params: list[Tensor]) -> list[MomentumStep]:
        steps = [self._next_step(group, p) for p in params]
        for p in params:
            self.state[p]["step"] += 1
        buffers = [self.state[p][_FIRST] for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        gradients = [gradient_of(p) for p in params]
        torch._foreach_add_(buffers, gradients, alpha=1.0 - group["momentum"] if group["ema"] else 1.0)
        return steps

    def _next_step(self, group: Group, p: Tensor) -> MomentumStep:
        if _FIRST not in self.state[p]:
            self.state[p] |= {"step": step_count(), _FIRST: zeros_for(p)}
        return MomentumStep(group["lr"])


@register("eco-adamw", kind="optimizer", paper="2601.22101")
class ECOAdamW(_ECO):
    """AdamW on quantized weights, without a full-precision copy (ECO).

    The error never enters the second moment. The law of `ECOSGD` holds exactly while the second moment and
    the bias correction stand still, else up to their relative change per step.

    Parameters
    ----------
    betas
        beta_1, above 0, and beta_2.
    eps
        Added to the root of the second moment.
    """

    carried: ClassVar[tuple[str, ...]] = (_FIRST, _SECOND)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        quantizer: str | float | Quantizer = "int8",
        rounding: Rounding = "sr",
        block: int | None = None,
        error_feedback: bool = True,
        staleness: float = 1.0,
        seed: int = 0,
        generator: torch.Generator | None = None,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "quantizer": quantizer,
            "rounding": rounding,
            "block": block,
            "error_feedback": error_feedback,
            "staleness": staleness,
            "foreach": foreach,
        }
        super().__init__(params, defaults, seed, generator)

    def check_group(self, group: Group) -> None:
        """Check the hyperparameters."""
        super().check_group(group)
        check_betas("betas", group["betas"])
        if group["betas"][0] == 0:
            raise ConfigError(
                "betas[0]=0 leaves no momentum that could carry the error; use a number above 0."
            )
        check_number("eps", group["eps"], low=0)

    def _beta(self, group: Group) -> float:
        return float(group["betas"][0])

    def _advance(self, group: Group, params: list[Tensor]) -> list[MomentumStep]:
        gradients = [gradient_of(p) for p in params]
        for p, g in zip(params, gradients, strict=True):
            if _FIRST not in self.state[p]:
                self.state[p] |= adam_state(g)
        states = [self.state[p] for p in params]
        options = {"lr": group["lr"], "betas": group["betas"], "eps": group["eps"]}
        denominators, sizes = adam_moments(gradients, states, **options)
        return [
            MomentumStep(size, denominator) for size, denominator in zip(sizes, denominators, strict=True)
        ]

    def _next_step(self, group: Group, p: Tensor) -> MomentumStep | None:
        state = self.state[p]
        if _FIRST not in state or not float(state["step"]):
            return None
        t, (beta_1, beta_2) = float(state["step"]), group["betas"]
        denominator = (state[_SECOND] / (1 - beta_2**t)).sqrt_().add_(group["eps"])
        return MomentumStep(group["lr"] / (1 - beta_1**t), denominator)
