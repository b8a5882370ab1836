"""A stack of models as rows of one tensor."""

from __future__ import annotations

from torch import Tensor

from turnout.client.flat_model import FlatModel, to_vector
from turnout.tasks.task import Vector


class StackedModel:
    """``parameters`` and ``gradient`` of C models, shape (C, P) each, in buffers that are used again.

    ``template`` brings module and layout.
    """

    def __init__(self, template: FlatModel) -> None:
        self.template = template
        self.module = template.module
        self.layout = template.layout
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, int], dict[str, Tensor]] = {}
        self.parameters = self.gradient = template.parameters.new_empty((0, self.size))

    @property
    def frozen(self) -> list[slice]:
        """Pieces of each vector that are not trained."""
        return self.template.frozen

    @property
    def size(self) -> int:
        """P, the number of parameters of one model."""
        return self.layout.size

    def begin(self, count: int, vector: Vector) -> None:
        """Become ``count`` models with the parameters ``vector``, shape (P,)."""
        self.parameters = self.workspace("parameters", count)
        self.gradient = self.workspace("gradient", count)
        self.load_vector(vector)

    def workspace(self, name: str, count: int) -> Tensor:
        """Return the buffer ``name``, shape (count, P), as it was left."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < count:
            buffer = self._buffers[name] = self.template.parameters.new_zeros((count, self.size))
            self._views = {key: views for key, views in self._views.items() if key[0] != name}
        return buffer[:count]

    def views(self, name: str, count: int) -> dict[str, Tensor]:
        """Return the tensors of the first ``count`` models in buffer ``name``, shape (count, ...) each."""
        views = self._views.get((name, count))
        if views is None:
            views = self._views[name, count] = self.split(self.workspace(name, count))
        return views

    def split(self, stack: Tensor) -> dict[str, Tensor]:
        """Return views of ``stack`` (a, P) by tensor name, shape (a, ...)."""
        return {
            t.name: stack[:, t.offset : t.offset + t.size].view(len(stack), *t.shape)
            for t in self.layout.tensors
        }

    def train(self, mode: bool) -> None:
        """Put the module in training or evaluation mode."""
        if self.module.training is not mode:
            self.module.train(mode)

    def load_vector(self, vector: Vector) -> None:
        """Copy ``vector``, shape (P,) or (C, P), into the parameters."""
        self.parameters.copy_(self.tensor(vector))

    def tensor(self, vector: Vector) -> Tensor:
        """Return ``vector`` as a new tensor beside the parameters (same device and dtype)."""
        return self.template.tensor(vector)

    def vector(self) -> Vector:
        """Return a copy of the parameters, shape (C, P)."""
        return to_vector(self.parameters)
