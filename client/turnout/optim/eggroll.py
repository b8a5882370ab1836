"""EGGROLL: evolution strategies with low-rank perturbations, for any PyTorch model (arXiv 2511.16652).

A step evaluates P antithetic pairs of members ``W +- sigma A B^T / sqrt(r)`` by forward passes alone and
moves along ``g = (1 / 2 P sigma) sum_j d_j E_j``, where d_j is what fitness the plus member has over the
minus member. Noise, sums and the step are those of the federated strategy, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from turnout.optim.perturbed import Perturbed
from turnout.wire.errors import ConfigError, unknown_name
from turnout.wire.perturbation import (
    KINDS,
    NOISES,
    Kind,
    NoiseName,
    NoiseSource,
    PerturbedTensor,
    default_kind,
    on_grid,
)
from turnout.wire.registry import register
from turnout.wire.replica import Ascent, Base

Fitness = Callable[[], float | Tensor]
_BASES: Final = ("sgd", "adam")
_MOMENTS: Final = ("first_moment", "second_moment")
_OWN: Final = ("seed", "round", "sigma", "pairs", "noise", "names")


@register("eggroll", kind="gradient-free", paper="2511.16652")
class EGGROLL(torch.optim.Optimizer):
    """Gradient-free optimizer: ``step(closure)`` raises what ``closure()`` returns, without ``backward``.

    Parameters given with names (``model.named_parameters()``) get the same noise wherever they have these
    names; without names they are numbered. A parameter group may set ``eggroll`` to ``"lowrank"``,
    ``"full"`` or ``"frozen"``, and any of the options below that are about the step. Raises `ConfigError`.

    lr
        Learning rate on the textbook estimate; see `textbook_lr` for that of the authors' code.
    sigma
        Size of the perturbations.
    rank
        Rank r of a matrix's perturbation; tensors of more dimensions are matrices of their first against the
        others. None: full-rank noise.
    pairs
        P, antithetic pairs a step: 2 P forward passes.
    base, momentum, betas
        ``"sgd"`` with ``momentum``, or ``"adam"`` with ``betas``.
    weight_decay
        Decoupled, once a step.
    freeze_1d
        Leave biases and other vectors as they are.
    seed
        Seeds all noise.
    noise
        ``"gaussian"`` or ``"rademacher"`` (signs).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        sigma: float,
        *,
        rank: int | None = 1,
        pairs: int = 20,
        base: Base = "sgd",
        momentum: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        freeze_1d: bool = False,
        seed: int = 0,
        noise: NoiseName = "gaussian",
    ) -> None:
        if not (isinstance(pairs, int) and pairs >= 1):
            raise ConfigError(f"pairs={pairs!r} is not possible; use a whole number >= 1.")
        if not (math.isfinite(sigma) and sigma > 0):
            raise ConfigError(f"sigma={sigma!r} is not possible; use a number > 0.")
        if noise not in NOISES:
            raise unknown_name("noise", str(noise), NOISES)
        self.sigma, self.pairs, self.noise, self.seed = sigma, pairs, noise, seed
        self.round = 1
        """Number of the next step, from which its noise follows."""
        self._sources: list[NoiseSource] = []
        defaults = {
            "lr": lr,
            "rank": rank,
            "base": base,
            "momentum": momentum,
            "betas": betas,
            "weight_decay": weight_decay,
            "freeze_1d": freeze_1d,
            "eggroll": None,
        }
        super().__init__(params, defaults)

    @staticmethod
    def textbook_lr(lr_code: float, sigma: float, pairs: int) -> float:
        """Return the ``lr`` that equals ``lr_code`` of the authors' code on z-scored fitnesses."""
        return lr_code * sigma**2 * math.sqrt(2 * pairs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; raises `ConfigError` for options that are not possible."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
            self._sources.append(self._source(group, sum(len(g["params"]) for g in self.param_groups[:-1])))
        except ConfigError:
            self.param_groups.pop()
            raise

    def step(self, closure: Fitness | None = None) -> float:  # type: ignore[override]
        """Evaluate ``pairs`` pairs and move; return their mean fitness.

        ``closure()`` returns the fitness of the model as it stands, larger being better; it must look at the
        same minibatch in every call of a step. Random draws in it (dropout) are the same for both members of
        a pair.
        """
        if closure is None:
            raise ConfigError("EGGROLL.step needs a closure that returns the fitness; pass one.")
        differences, mean = self.evaluate(closure, range(self.pairs))
        self.apply_pairs(range(self.pairs), differences / (2.0 * self.pairs * self.sigma))
        return mean

    def evaluate(self, closure: Fitness, pairs: Sequence[int]) -> tuple[np.ndarray[Any, Any], float]:
        """Return ``d_j = F+ - F-`` of ``pairs`` in this round, float32, and the mean fitness; nothing moves.

        A member whose fitness is not a number makes its pair's difference 0.
        """
        perturbed = [
            Perturbed(source, group["params"])
            for source, group in zip(self._sources, self.param_groups, strict=True)
        ]
        fitness = np.empty((len(pairs), 2))
        try:
            with torch.no_grad():
                for row, pair in enumerate(pairs):
                    draws = [source.draw(self.round, pair) for source in self._sources]
                    start = torch.get_rng_state()
                    for column, sign in enumerate((1.0, -1.0)):
                        for part, drawn in zip(perturbed, draws, strict=True):
                            part.write(drawn, sign * self.sigma)
                        torch.set_rng_state(start)
                        fitness[row, column] = float(closure())
        finally:
            for part in perturbed:
                part.restore()
        differences = np.nan_to_num(fitness[:, 0] - fitness[:, 1], posinf=0.0, neginf=0.0)
        return differences.astype(np.float32), float(fitness.mean())

    def apply_pairs(self, pairs: Sequence[int], weights: np.ndarray[Any, Any]) -> None:
        """Take the step of this round from ``weights`` w_j of ``pairs``: ``g = sum_j w_j E_j``.

        This is all that a party needs who did not evaluate the pairs. Without pairs nothing moves.
        """
        indices = np.array(list(pairs), np.int64)
        if len(indices) != len(weights):
            raise ConfigError(f"{len(weights)} weights for {len(indices)} pairs; give one for each.")
        for source, group in zip(self._sources, self.param_groups, strict=True) if len(indices) else ():
            parts = source.combine(self.round, indices, on_grid(np.asarray(weights), source.rank))
            for parameter, part in zip(group["params"], parts, strict=True):
                if part is not None:
                    self._move(group, parameter, part)
        self.round += 1

    @torch.no_grad()
    def _move(self, group: Mapping[str, Any], parameter: Tensor, g: np.ndarray[Any, Any]) -> None:
        rule, state = _rule(group), self.state[parameter]
        names = _MOMENTS[: rule.num_moments]
        if not state:
            state["step"] = 0
            state.update({name: torch.zeros_like(parameter) for name in names})
        state["step"] += 1
        theta, moments = rule.step(
            parameter.double().cpu().numpy(),
            [state[name].double().cpu().numpy() for name in names],
            g,
            state["step"],
        )
        parameter.copy_(torch.from_numpy(theta))
        for name, moment in zip(names, moments, strict=True):
            state[name] = torch.from_numpy(moment).to(parameter)  # A loaded state is not ours to change.

    @property
    def names(self) -> list[str]:
        """The parameters' names in order; noise follows from them."""
        return [tensor.name for source in self._sources for tensor in source.tensors]

    def __getstate__(self) -> dict[str, Any]:
        """Return what makes a copy; ``torch.optim`` leaves out attributes of subclasses."""
        own = {name: getattr(self, name) for name in _OWN[:-1]}
        return {**super().__getstate__(), **own, "_sources": self._sources}

    def state_dict(self) -> dict[str, Any]:
        """Return moments and groups as every optimizer does, and seed, round, sigma, pairs, noise, names."""
        return {**super().state_dict(), "eggroll": {name: getattr(self, name) for name in _OWN}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; raises `ConfigError` for one of parameters with other names."""
        own = state_dict["eggroll"]
        if list(own["names"]) != self.names:
            raise ConfigError(
                f"the state is of parameters {own['names'][:3]}, this optimizer has {self.names[:3]}; make "
                "it with the same names in the same order."
            )
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "eggroll"})
        for name in _OWN[:-1]:
            setattr(self, name, own[name])
        counts = np.cumsum([0, *(len(group["params"]) for group in self.param_groups)]).tolist()
        self._sources = [
            self._source(group, at) for group, at in zip(self.param_groups, counts, strict=False)
        ]

    def _source(self, group: Mapping[str, Any], first: int) -> NoiseSource:
        names = group.get("param_names") or [str(first + i) for i in range(len(group["params"]))]
        rank: int | None = group["rank"]
        tensors = []
        for name, parameter in zip(names, group["params"], strict=True):
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ConfigError(
                    f"parameter {name!r} is {parameter.dtype}, which rounds small perturbations away; keep "
                    "the weights in float32."
                )
            shape = tuple(parameter.shape)
            kind: Kind = group["eggroll"] or default_kind(shape, rank, freeze_1d=group["freeze_1d"])
            if kind == "lowrank" and len(shape) < 2:
                kind = "full"
            tensors.append(PerturbedTensor(name, shape, kind))
        return NoiseSource(tuple(tensors), self.seed, rank or 1, self.noise)


def _rule(group: Mapping[str, Any]) -> Ascent:
    momentum = group["momentum"] if group["base"] == "sgd" else 0.0
    return Ascent(
        lr=group["lr"],
        base=group["base"],
        momentum=momentum,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
    )


def _check(group: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an option of a group that is not possible."""
    if group["base"] not in _BASES:
        raise unknown_name("base", str(group["base"]), _BASES)
    if group["eggroll"] is not None and group["eggroll"] not in KINDS:
        raise unknown_name("eggroll", str(group["eggroll"]), KINDS)
    rank = group["rank"]
    if rank is not None and not (isinstance(rank, int) and rank >= 1):
        raise ConfigError(f"rank={rank!r} is not possible; use a whole number >= 1, or None for full rank.")
    for name in ("lr", "weight_decay"):
        if not (math.isfinite(group[name]) and group[name] >= 0):
            raise ConfigError(f"{name}={group[name]!r} is not possible; use a number >= 0.")
    for name, value in (("momentum", group["momentum"]), *(("betas", beta) for beta in group["betas"])):
        if not 0 <= value < 1:
            raise ConfigError(f"{name}={value!r} is not possible; use a number in [0, 1).")
