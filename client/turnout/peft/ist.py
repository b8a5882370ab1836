"""IST, importance-aware sparse tuning: which layers train is learned (arXiv 2410.11772), on any adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from turnout.allocation import DenseForm, IstAllocator, draw_layers, score_change
from turnout.allocation.ist import layer_count
from turnout.peft.config import AdapterConfig, Aggregation, Companion
from turnout.peft.layer import AdapterLayer
from turnout.tasks.training_part import TrainingPart
from turnout.tasks.validation import check_count, check_number
from turnout.wire.errors import ConfigError, unknown_name
from turnout.wire.registry import find, register

_DRAWS = 20  # Tries for a set of damped layers that was not probed yet; few layers have few sets.


@register(
    "ist",
    kind="adapter",
    paper="2410.11772",
    summary="Trains a learned choice of layers (IST), on any adapter",
)
@dataclass(frozen=True, kw_only=True)
class IstConfig(AdapterConfig):
    """IST: in a step only some layers' adapters train, drawn by a score that is learned from damped layers.

    The adapters, what travels of them and whether their mean is exact are those of ``base``; of layers that
    did not train nothing goes up, and L scores go both ways. A score rises where damping the layer helps:
    high means unimportant.

    Attributes
    ----------
    base
        The adapter, with its options: ``{name = "lora", r = 4}``.
    mode
        "shared": the server draws the layers of a round, the same for all clients. "local": each client draws
        for itself at every step; a layer that a client did not train counts as unchanged.
    n_update_ratio
        Share of the layers that train.
    n_suppress_ratio
        Share of the layers that a probe damps.
    probes
        K, the number of probes at a time.
    score_lr
        Step size of the scores. 0 leaves them as they are: random sparse tuning.
    suppression
        Factor on the damped layers' changes.
    interval
        Steps between probes; from the second round on, a local training begins with one.
    """

    base: Mapping[str, Any] = field(default_factory=lambda: {"name": "lora"})
    mode: Literal["shared", "local"] = "shared"
    n_update_ratio: float = 0.25
    n_suppress_ratio: float = 0.5
    probes: int = 3
    score_lr: float = 10.0
    suppression: float = 0.25
    interval: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("shared", "local"):
            raise unknown_name("mode", str(self.mode), ("shared", "local"))
        for name in ("n_update_ratio", "n_suppress_ratio"):
            check_number(name, getattr(self, name), low=0, high=1, open_low=True)
        check_count("probes", self.probes, low=1)
        check_number("score_lr", self.score_lr, low=0)
        check_number("suppression", self.suppression, low=0)
        check_count("interval", self.interval, low=1)
        _ = self.adapter  # Bad options of the base are refused here.

    @property
    def adapter(self) -> AdapterConfig:
        """The configuration of the adapters."""
        options = dict(self.base)
        slug = options.pop("name", "lora")
        if slug == "ist" or not isinstance(slug, str):
            raise ConfigError(f"base name={slug!r} is not an adapter to build on; use base.name = 'lora'.")
        own = {
            name: getattr(self, name)
            for name in ("target_modules", "exclude_modules", "modules_to_save", "base_dtype", "seed")
        }
        try:
            config: AdapterConfig = find("adapter", slug).target(**own, **options)
        except TypeError as error:
            raise ConfigError(f"base={dict(self.base)!r}: {error}; give options of {slug!r} only.") from error
        if config.allocator() is not None:
            raise ConfigError(
                f"base name={slug!r} has a budget of its own, shared out by the server, which IST drops; "
                "use base.name = 'lora'."
            )
        return config

    @property
    def aggregation(self) -> Aggregation:  # type: ignore[override]
        """That of the adapters."""
        return self.adapter.aggregation

    @property
    def refresh_interval(self) -> int | None:
        """That of the adapters."""
        return self.adapter.refresh_interval

    def refresh(self, layers: Mapping[str, AdapterLayer]) -> None:
        """Pick what the adapters share anew."""
        self.adapter.refresh(layers)

    @property
    def shares(self) -> bool:  # type: ignore[override]
        """Whether the adapters do."""
        return self.adapter.shares

    @property
    def dense_form(self) -> DenseForm | None:  # type: ignore[override]
        """That of the adapters."""
        return self.adapter.dense_form

    @property
    def adapts(self) -> tuple[type[nn.Module], ...]:  # type: ignore[override]
        """The kinds of layers that the adapters are for."""
        return self.adapter.adapts

    @property
    def adapts_transposed(self) -> bool:  # type: ignore[override]
        """Whether the adapters are for such layers too."""
        return self.adapter.adapts_transposed

    def allocator(self, local_steps: int | None = 1) -> IstAllocator:
        """Return what draws the layers between rounds."""
        return IstAllocator(n_update_ratio=self.n_update_ratio, mode=self.mode, seed=self.seed)

    def targets(self, module: nn.Module, chosen: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        """Return the layers that the adapters choose."""
        return self.adapter.targets(module, chosen)

    def layers(self, targets: Mapping[str, nn.Module]) -> dict[str, AdapterLayer]:
        """Return the adapters."""
        return self.adapter.layers(targets)

    def layer(self, name: str, base_layer: nn.Module, generator: torch.Generator) -> AdapterLayer:
        """Return the adapter of ``base_layer``."""
        return self.adapter.layer(name, base_layer, generator)

    def companions(self, layers: Mapping[str, AdapterLayer]) -> dict[str, Companion]:
        """Return the scores, as the module ``ist``."""
        return {"ist": Ist(self, layers)}


class Ist(Companion, TrainingPart):
    """Chooses which of L layers train, and scores them.

    Adapters in one numbered block of the model (``layers.3.attention.q``) are one layer. ``running_scores``
    (L,) are q; ``active`` (L,) are the round's layers.
    """

    stackable = False

    def __init__(self, config: IstConfig, layers: Mapping[str, AdapterLayer]) -> None:
        super().__init__()
        self.config = config
        groups: dict[str, list[AdapterLayer]] = {}
        for name, layer in layers.items():
            groups.setdefault(block_of(name), []).append(layer)
        self.names = tuple(groups)
        self._groups = list(groups.values())  # In a list: not submodules of this one as well.
        self.running_scores: Tensor
        self.active: Tensor
        self.register_buffer("running_scores", torch.zeros(len(groups)))
        self.register_buffer("active", torch.ones(len(groups), dtype=torch.uint8))
        self._generator = np.random.default_rng(config.seed)
        self._training = False
        self._step = 0
        self._round = 1
        self._chosen: Iterable[int] = ()

    def start_training(self, server_round: int, seed: tuple[int, ...]) -> None:
        """Seed the client's draws of this round."""
        self._generator = np.random.default_rng([*seed, self.config.seed, 1])
        self._step, self._round, self._training = 0, server_round, True

    def before_step(self, loss: Callable[[], Tensor]) -> None:
        """Probe, every ``interval`` steps, and choose the layers of the step."""
        # Of the whole run, only the very first step has nothing to damp.
        begun = self._step > 0 or self._round > 1
        if begun and self._step % self.config.interval == 0 and self.config.score_lr:
            self.probe(loss)
        self._step += 1
        count = len(self._groups)
        if self.config.mode == "shared":
            self._chosen = np.flatnonzero(self.active.numpy(force=True)).tolist()
        else:
            share = layer_count(self.config.n_update_ratio, count)
            self._chosen = draw_layers(-self._scores(), share, self._generator).tolist()

    def resting(self) -> list[Tensor]:
        """Return the trained tensors of the layers that were not chosen."""
        if not self._training:
            return []
        chosen = set(self._chosen)
        return [
            parameter
            for index, group in enumerate(self._groups)
            if index not in chosen
            for layer in group
            for parameter in layer.parameters()
            if parameter.requires_grad
        ]

    def end_training(self) -> None:
        """Let every layer train again: a large-batch gradient is of all of them."""
        self._training = False

    def probe(self, loss: Callable[[], Tensor]) -> None:
        """Measure ``loss`` with different layers damped, and move the scores."""
        count = len(self._groups)
        size, scores = layer_count(self.config.n_suppress_ratio, count), self._scores()
        sets: list[list[int]] = []
        for _ in range(self.config.probes):
            for _ in range(_DRAWS):
                drawn = draw_layers(scores, size, self._generator).tolist()
                if drawn not in sets:
                    break
            sets.append(drawn)
        damped = np.zeros((len(sets), count), bool)
        losses = np.zeros(len(sets))
        for k, drawn in enumerate(sets):
            damped[k, drawn] = True
            hooks = [
                layer.register_forward_hook(partial(_damp, self.config.suppression))
                for index in drawn
                for layer in self._groups[index]
            ]
            try:
                with torch.no_grad():
                    losses[k] = float(loss())
            finally:
                for hook in hooks:
                    hook.remove()
        change = score_change(scores, damped, losses, self.config.score_lr)
        self.running_scores += torch.from_numpy(change).to(self.running_scores)

    def _scores(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        return self.running_scores.numpy(force=True).astype(np.float64)


def block_of(name: str) -> str:
    """Return the block that the layer ``name`` is in: up to its first number, or the name itself."""
    match = re.match(r"(.*?\.)?\d+(?=\.|$)", name)
    return match[0] if match else name


def _damp(factor: float, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Return the output as if the change of the weight were ``factor`` times as large."""
    base = cast(Tensor, cast(AdapterLayer, layer).base_layer(*inputs))
    return base + factor * (output - base)
