"""Dropout whose draws are those of a client's round, whatever else runs in the process."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from turnout.tasks.training_part import TrainingPart


class SeededDropout(nn.Module, TrainingPart):
    """In local training, zero entries with probability ``p`` and scale the others by ``1 / (1 - p)``.

    Draws follow from the client's seed, the round and ``name``, on the device of the inputs. Outside of local
    training the module is ``nn.Dropout``: nothing in evaluation, else torch's global generator.
    """

    stackable = False

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        self.p = p
        self._stream = zlib.crc32(name.encode())
        self._seed: int | None = None
        self._generator: torch.Generator | None = None

    def start_training(self, server_round: int, seed: tuple[int, ...]) -> None:
        """Seed the draws of this round."""
        state = np.random.SeedSequence([*seed, self._stream]).generate_state(1, np.uint64)
        self._seed, self._generator = int(state[0]) >> 1, None

    def end_training(self) -> None:
        """Let go of the draws."""
        self._seed = self._generator = None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with zeros among it; in evaluation as it is."""
        if self._seed is None or not self.training:
            return dropout(x, self.p, self.training)
        if self._generator is None:
            self._generator = torch.Generator(x.device).manual_seed(self._seed)
        kept = torch.rand(x.shape, device=x.device, generator=self._generator) >= self.p
        return x * kept * (1 / (1 - self.p))


def dropping(p: float, name: str) -> nn.Module:
    """Return the dropout of the layer ``name``; one that does nothing costs nothing."""
    return SeededDropout(p, name) if p else nn.Identity()
