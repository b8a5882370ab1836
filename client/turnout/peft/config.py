"""What every adapter's configuration has: which layers it adapts, what trains beside it."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from turnout.allocation import Allocator, DenseForm
from turnout.peft.layer import AdapterLayer, is_transposed
from turnout.tasks.validation import check_count
from turnout.wire.errors import ConfigError, unknown_name

Aggregation = Literal["exact", "approximate", "exact-svd", "exact-als", "exact-fold"]
"""Whether the mean of what clients send is the mean of their dense updates, or is made so by the server."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_averaging(aggregation: object, *possible: Aggregation) -> None:
    """Raise `ConfigError` unless ``aggregation`` is "approximate" or one of the ``possible``."""
    if aggregation not in ("approximate", *possible):
        raise unknown_name("aggregation", str(aggregation), ("approximate", *possible))


class Companion(nn.Module):
    """A module beside the adapters, at the root of the model: its buffers travel, it computes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``: in a sequential model a companion comes last."""
        return x


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(ABC):
    """Base of the adapters' configurations; names and defaults are those of Hugging Face ``peft``.

    ``aggregation`` says whether the mean of what travels gives the mean of the dense updates. ``adapts`` are
    the kinds of layers that can be adapted.

    Attributes
    ----------
    target_modules
        Names (or last parts of names) of the layers to adapt, or one regular expression for whole names.
        By default what the task says, else every linear layer but the output embedding.
    exclude_modules
        Layers to leave alone, in the same form.
    modules_to_save
        Names (or last parts) of modules that train whole and travel beside the adapter, such as a new head.
    base_dtype
        "float32", "bfloat16" or "float16" of the frozen base; what is trained is float32, and so are the
        model's inputs and output if they are floats. By default the base stays as it is.
    seed
        Seeds the adapter's first values and random choices; the run's seed unless it is given.
    """

    aggregation: ClassVar[Aggregation]
    dense_form: ClassVar[DenseForm | None] = None
    """What the dense updates are made of, for a server that averages those; None averages what travels."""
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    adapts_transposed: ClassVar[bool] = True
    """Whether linear layers that store their weight transposed can be adapted as well."""
    shares: ClassVar[bool] = False
    """Whether layers have a shared state that the server must hand out."""

    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    base_dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("seed", self.seed, low=0)
        if self.base_dtype is not None and self.base_dtype not in DTYPES:
            raise unknown_name("base_dtype", str(self.base_dtype), DTYPES)
        for field in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, field)
            if isinstance(value, (list, set)):
                object.__setattr__(self, field, tuple(value))
            elif field == "modules_to_save" and isinstance(value, str):
                raise ConfigError(f"{field}={value!r}: give a list of names, such as [{value!r}].")

    @abstractmethod
    def layer(self, name: str, base_layer: nn.Module, generator: torch.Generator) -> AdapterLayer:
        """Return the adapter of ``base_layer``, the model's module ``name``.

        All randomness comes from ``generator``, a CPU one that depends on ``seed`` and ``name`` only.
        """

    def can_adapt(self, layer: nn.Module) -> bool:
        """Return whether ``layer`` is of a kind that can be adapted."""
        return isinstance(layer, self.adapts) or (self.adapts_transposed and is_transposed(layer))

    def targets(self, module: nn.Module, chosen: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        """Return the layers of ``module`` to adapt; ``chosen`` are those that the names in here mean."""
        return chosen

    def layers(self, targets: Mapping[str, nn.Module]) -> dict[str, AdapterLayer]:
        """Return the adapters of all ``targets``; methods that share something among layers override it."""
        return {name: self.layer(name, base, self.generator(name)) for name, base in targets.items()}

    @property
    def refresh_interval(self) -> int | None:
        """Rounds after which the server picks the shared state anew; None for never."""
        return None

    def refresh(self, layers: Mapping[str, AdapterLayer]) -> None:
        """Pick what the layers share anew, from their present weights, where the method says so."""

    def companions(self, layers: Mapping[str, AdapterLayer]) -> dict[str, Companion]:
        """Return modules to put beside the attached ``layers``, at the root; all their tensors travel."""
        return {}

    def allocator(self, local_steps: int | None = 1) -> Allocator | None:
        """Return what decides between rounds, of ``local_steps`` steps, what is trained, if anything."""
        return None

    def generator(self, name: str) -> torch.Generator:
        """Return a new generator for the layer ``name``, the same on every machine and device."""
        # The generator looks at the lower 32 bits only.
        return torch.Generator("cpu").manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))

    def check_rank(self, field: str = "r") -> None:
        """Raise `ConfigError` unless ``field`` is a whole number of at least 1."""
        check_count(field, getattr(self, field), low=1)
