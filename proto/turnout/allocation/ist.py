"""IST's choice of layers (arXiv 2410.11772): drawn by scores that the server holds for all clients.

The score q rises where damping a layer helps: a high q means unimportant, and layers to train are drawn from
``sigmoid(-q)``, layers to damp from ``sigmoid(q)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import numpy as np

from turnout.allocation.allocator import Allocator, ModelView
from turnout.wire.arrays import NDArray
from turnout.wire.errors import ConfigError

_LARGEST: Final = 30.0  # sigmoid(-30) is 1e-13: still a positive probability.


def sigmoid(q: NDArray) -> NDArray:
    """Return the logistic function of q, with |q| bounded so that no probability is 0 or 1."""
    p: NDArray = 1.0 / (1.0 + np.exp(-np.clip(q.astype(np.float64), -_LARGEST, _LARGEST)))
    return p


def draw_layers(q: NDArray, count: int, generator: np.random.Generator) -> NDArray:
    """Return ``count`` different layers, drawn with probabilities proportional to ``sigmoid(q)``, sorted.

    ``draw_layers(-q, ...)`` draws layers to train, ``draw_layers(q, ...)`` layers to damp.
    """
    p = sigmoid(q)
    return np.sort(generator.choice(len(q), count, replace=False, p=p / p.sum()))


def centred_rewards(losses: NDArray) -> NDArray:
    """Return ``exp(-loss)`` of the probes, shape (K,), minus its mean."""
    rewards: NDArray = np.exp(-losses.astype(np.float64))
    rewards -= rewards.mean()
    return rewards


def score_change(q: NDArray, probes: NDArray, losses: NDArray, score_lr: float) -> NDArray:
    """Return dq, shape (L,): the REINFORCE step from K probes.

    ``probes`` is a boolean matrix (K, L) of the layers that each probe damped, ``losses`` what came of it.
    """
    p = sigmoid(q)
    change: NDArray = score_lr * (centred_rewards(losses) @ probes.astype(np.float64)) * p * (1.0 - p)
    return change


def layer_count(ratio: float, layers: int) -> int:
    """Return the number of layers that ``ratio`` of ``layers`` means, at least one."""
    return max(1, int(ratio * layers))


@dataclass(frozen=True, kw_only=True)
class IstAllocator(Allocator):
    """Draw the layers that all clients train in the next round (mode ``"shared"``).

    The clients' mean of q is the server's q plus their mean change. In mode ``"local"`` clients draw for
    themselves, at every step, and nothing is decided here.
    """

    decided: ClassVar[tuple[str, ...]] = ("active",)

    n_update_ratio: float = 0.25
    mode: Literal["shared", "local"] = "shared"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.n_update_ratio <= 1:
            raise ConfigError(f"n_update_ratio={self.n_update_ratio!r} is a share of the layers; use 0 to 1.")

    def allocate(self, server_round: int, model: ModelView) -> None:
        """Set ``active``, 1 for the layers of the next round; bound the scores."""
        for prefix, q in model.ending("running_scores"):
            np.clip(q, -_LARGEST, _LARGEST, out=q)
            if self.mode == "shared":
                generator = np.random.default_rng([self.seed, server_round + 1])
                active = np.zeros(len(q), np.uint8)
                active[draw_layers(-q, layer_count(self.n_update_ratio, len(q)), generator)] = 1
                model.buffers[f"{prefix}active"] = active
