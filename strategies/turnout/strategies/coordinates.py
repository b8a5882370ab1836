"""In which coordinates a strategy computes, as opposed to those in which models travel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from turnout.wire import NDArray, ParameterLayout, keys

# Records of vectors that transform as gradients do, not as models.
GRADIENTS: Final = frozenset({keys.GRADIENT, keys.BULLSEYE, keys.CONTROL})


class Coordinates:
    """Models and gradients as the strategy's vectors; here those that travel, as they are.

    A subclass makes a strategy compute in other coordinates than its clients: ``inside`` is the strategy's
    vector, shape (P,), ``outside`` that of the messages.
    """

    def bind(self, layout: ParameterLayout, vector: NDArray) -> None:
        """Start a run with the initial model ``vector``, in the messages' ``layout``."""

    def decided(self, buffers: Mapping[str, NDArray]) -> None:
        """Note the buffers that travel beside the next models, after `bind` and whenever they are decided."""

    def sent(self, vector: NDArray) -> None:
        """Note that the clients now receive ``vector``, in the messages' layout."""

    def inside(self, vector: NDArray) -> NDArray:
        """Return a model that travelled, as the strategy's vector."""
        return vector

    def outside(self, vector: NDArray) -> NDArray:
        """Return the strategy's model as it travels."""
        return vector

    def project(self, vector: NDArray) -> NDArray:
        """Return the nearest of the strategy's vectors that is a model as clients can hold it."""
        return vector

    def adopted(self, vector: NDArray) -> NDArray:
        """Return the strategy's vector for a model whose travelling form an allocator changed."""
        return vector

    def gradient_inside(self, vector: NDArray) -> NDArray:
        """Return a gradient that travelled, as the strategy's vector."""
        return vector

    def gradient_outside(self, vector: NDArray) -> NDArray:
        """Return the strategy's gradient as it travels."""
        return vector

    def record_inside(self, name: str, vector: NDArray) -> NDArray:
        """Return the vector of the record ``name``, a model or a gradient, as the strategy's."""
        return self.gradient_inside(vector) if name in GRADIENTS else self.inside(vector)

    def record_outside(self, name: str, vector: NDArray) -> NDArray:
        """Return the strategy's vector for the record ``name`` as it travels."""
        return self.gradient_outside(vector) if name in GRADIENTS else self.outside(vector)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Go on from a tree of `state_dict`; `bind` comes first."""
