"""A torch model whose float parameters, and their gradients, are one flat vector each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor, nn

from turnout.client.training_parts import TrainingParts
from turnout.tasks.task import Vector
from turnout.tasks.travelling import place, record_of, travelling


class FlatModel:
    """What travels of ``module`` re-based onto two flat tensors of P numbers, in ``state_dict`` order.

    ``parameters`` and ``gradient`` are those tensors; each parameter and its ``.grad`` is a view into them,
    so an SGD step is one ``add_``, and loading or reading the model is one copy. Buffers (integers,
    batch-norm statistics) keep their own storage, frozen tensors the one that they share (see
    `turnout.tasks.travelling`). Not for use by two threads at once.

    Raises `LayoutError` for a module that cannot be one (see `turnout.tasks.travelling.record_of`).
    """

    def __init__(self, module: nn.Module, device: str | torch.device = "cpu") -> None:
        self.module = place(module, device)
        self.shared_digest = ""  # Of the state that the server handed out for its adapters, if it did.
        state = travelling(module)
        _, self.layout = record_of(module)
        dtype = torch.float64 if self.layout.dtype == np.float64 else torch.float32
        self.parameters = torch.zeros(self.layout.size, dtype=dtype, device=device)
        self.gradient = torch.zeros_like(self.parameters)
        self._tensors: list[Tensor] = []
        self.frozen: list[slice] = []  # Pieces of the vector that no step may move.
        for spec in self.layout.tensors:
            tensor = state[spec.name]
            self._tensors.append(tensor)
            piece = slice(spec.offset, spec.offset + spec.size)
            self.parameters[piece].copy_(tensor.detach().reshape(-1))
            tensor.data = self.parameters[piece].view(spec.shape)
            if tensor.requires_grad:
                tensor.grad = self.gradient[piece].view(spec.shape)
            else:
                self.frozen.append(piece)
        convolves = any(isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)) for part in self.module.modules())
        self._channels_last = convolves and self.parameters.device.type == "cpu"
        self.parts = TrainingParts(module)
        self.buffers: dict[str, Tensor] = {spec.name: state[spec.name] for spec in self.layout.buffers}
        # On the CPU, the parameters as a NumPy view: reads and writes go past torch.
        self._host: Vector | None = self.parameters.numpy() if self.parameters.device.type == "cpu" else None

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return self.layout.size

    @contextmanager
    def own_gradients(self) -> Iterator[list[Tensor]]:
        """Let autograd make ``.grad`` anew for each parameter that is trained; these are what is yielded.

        Afterwards ``.grad`` is a view into ``gradient`` again.
        """
        trained = [(tensor, tensor.grad) for tensor in self._tensors if tensor.requires_grad]
        try:
            for tensor, _ in trained:
                tensor.grad = None
            yield [tensor for tensor, _ in trained]
        finally:
            for tensor, gradient in trained:
                tensor.grad = gradient

    def train(self, mode: bool) -> None:
        """Put the module in training mode, or in evaluation mode (batch norm uses its stored statistics)."""
        if self.module.training is not mode:
            self.module.train(mode)

    def inputs(self, x: Tensor) -> Tensor:
        """Return ``x`` in the memory order in which the model is fastest: images channels last on a CPU."""
        if not self._channels_last or x.dim() != 4:
            return x
        _, channels, height, width = x.shape
        if channels > 1 or not x.is_contiguous():
            return x.contiguous(memory_format=torch.channels_last)
        # With one channel the order is a matter of strides only, and PyTorch goes by them.
        return x.as_strided(x.shape, (height * width, 1, width, 1), x.storage_offset())

    def load(self, record: Mapping[str, Array]) -> None:
        """Copy ``record`` (parameters and buffers) into the model; `LayoutError` when it does not fit."""
        vector = self.layout.flatten(record, out=self._host)
        if self._host is None:
            self.load_vector(vector)
        for name, buffer in self.layout.buffers_of(record).items():
            self.buffers[name].copy_(torch.tensor(buffer))

    def load_vector(self, vector: Vector) -> None:
        """Copy ``vector``, shape (P,), into the parameters."""
        if self._host is not None:
            np.copyto(self._host, vector)
        else:
            self.parameters.copy_(torch.tensor(vector))

    def tensor(self, vector: Vector) -> Tensor:
        """Return ``vector`` as a new tensor beside the parameters (same device and dtype)."""
        return torch.tensor(vector, dtype=self.parameters.dtype, device=self.parameters.device)

    def vector(self) -> Vector:
        """Return a copy of the parameters, shape (P,)."""
        return to_vector(self.parameters) if self._host is None else self._host.copy()

    def record(self, vector: Vector) -> ArrayRecord:
        """Return ``vector`` with the model's present buffers, as a record to send."""
        if not self.buffers:
            return self.layout.record(vector)
        copies = {name: buffer.detach().cpu().numpy().copy() for name, buffer in self.buffers.items()}
        return self.layout.record(vector, copies)


def to_vector(tensor: Tensor) -> Vector:
    """Return a copy of ``tensor`` as a NumPy vector."""
    return tensor.detach().cpu().numpy().copy()
