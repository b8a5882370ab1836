"""What Flower's own strategies keep between rounds, as a tree for a checkpoint.

Flower has no way to save a strategy, so the attributes are named here; a contract test runs every strategy
and fails when one keeps something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from turnout.wire import CheckpointError, as_array, view
from turnout.wire.flower import array_record

KEPT: Final = ("m_t", "v_t", "momentum_vector", "current_arrays", "clipping_norm")
"""Attributes that carry over from round to round."""
PASSING: Final = frozenset({"_pending_events"})
"""Attributes that change within a round only."""


class StockState:
    """The state of ``stock``, and of the strategy inside if it wraps one."""

    def __init__(self, stock: Strategy) -> None:
        self._stock = stock
        self._fresh = {id(part): {n: getattr(part, n) for n in names} for part, names in self._parts()}

    def _parts(self) -> Iterator[tuple[Strategy, list[str]]]:
        """Yield the strategy and those inside it, each with the names of what it keeps."""
        part: Any = self._stock
        while isinstance(part, Strategy):
            # A fixed clipping norm is a setting, and the model at hand is set anew in every round.
            names: list[str] = [name for name in KEPT if name in vars(part) and self._carries(part, name)]
            yield part, names
            part = getattr(part, "strategy", None)

    @staticmethod
    def _carries(part: Strategy, name: str) -> bool:
        if name == "current_arrays":
            return hasattr(part, "momentum_vector")
        return name != "clipping_norm" or hasattr(part, "clip_norm_lr")

    @property
    def needed_metrics(self) -> list[str]:
        """The metrics of a reply without which the strategy raises."""
        needed = [str(part.train_loss_key) for part, _ in self._parts() if hasattr(part, "train_loss_key")]
        clip = any("ClientSideAdaptive" in type(part).__name__ for part, _ in self._parts())
        return needed + (["norm_bit"] if clip else [])

    @property
    def scales_arrays(self) -> bool:
        """Whether replies are multiplied in place, which NumPy refuses for integers."""
        return any(hasattr(part, "train_loss_key") for part, _ in self._parts())

    def numbers(self) -> dict[str, float]:
        """Return the numbers among what is kept, by kebab-case name."""
        return {
            name.replace("_", "-"): float(getattr(part, name))
            for part, names in self._parts()
            for name in names
            if isinstance(getattr(part, name), (int, float))
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays among what is kept."""
        return _bytes(self.state_dict())

    def reset(self) -> None:
        """Set what is kept to what it was when the strategy was made."""
        for part, names in self._parts():
            for name in names:
                setattr(part, name, self._fresh[id(part)][name])

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept: for each part a table of numbers and of arrays by name."""
        return {
            str(depth): {name: _encoded(getattr(part, name)) for name in names}
            for depth, (part, names) in enumerate(self._parts())
        }

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        for depth, (part, names) in enumerate(self._parts()):
            stored = tree[str(depth)]
            for name in names:
                setattr(part, name, _decoded(name, stored[name]))

    def check(self, name: str) -> None:
        """Raise `CheckpointError` unless ``name`` is this strategy's."""
        own = type(self._stock).__name__
        if name != own:
            raise CheckpointError(f"checkpoint is of strategy {name!r}, this run uses {own!r} of Flower.")


def _encoded(value: Any) -> Any:
    if isinstance(value, ArrayRecord):
        return _numbered({name: view(array) for name, array in value.items()})
    if isinstance(value, list):
        return _numbered(dict(enumerate(value)))
    if isinstance(value, Mapping):
        return _numbered(value)
    return value


def _numbered(arrays: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the arrays by place and name: a checkpoint sorts its keys, but FedAvgM goes by the order."""
    return {f"{at:06d} {name}": np.asarray(array) for at, (name, array) in enumerate(arrays.items())}


def _decoded(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    arrays = {key.partition(" ")[2]: np.array(value[key]) for key in sorted(value)}
    if name == "current_arrays":
        return array_record({key: as_array(array) for key, array in arrays.items()})
    return list(arrays.values()) if name == "momentum_vector" else arrays


def _bytes(tree: Any) -> int:
    if isinstance(tree, Mapping):
        return sum(_bytes(value) for value in tree.values())
    return int(tree.nbytes) if isinstance(tree, np.ndarray) else 0
