"""The same federation twice: averaging what adapters send, and averaging the dense weights that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from turnout.peft import AdapterConfig, attach
from turnout.reproduce.transfer import digits, pretrained

CLIENTS: Final = 4
_STEPS: Final = 10
_RATE: Final = 0.05
_BATCH: Final = 32


@dataclass(frozen=True)
class Averaging:
    """``gap`` is the largest difference of the two federations' hidden weights, relative to their change.

    ``uplink_bytes`` is what a client sends, ``numbers`` the count behind it.
    """

    gap: float
    uplink_bytes: int
    numbers: int


def compare(config: AdapterConfig, *, width: int, rounds: int, seed: int) -> Averaging:
    """Return how far averaging of what travels is from averaging the weights, after one and more rounds.

    4 clients with labels of their own, SGD. In every round both start from the first federation's model, so
    that the gap is that of the averaging alone; it is summed over the rounds.
    """
    adapted = attach(pretrained(width, seed), config)
    state = {name: tensor.clone() for name, tensor in adapted.trainable_state_dict().items()}
    gap = change = 0.0
    for server_round in range(rounds):
        adapted.load_trainable_state_dict(state)
        before = adapted.delta_weights()
        replies, dense = [], []
        for client in range(CLIENTS):
            adapted.load_trainable_state_dict(state)
            _train(adapted.module, client, server_round, seed)
            replies.append({n: t.clone() for n, t in adapted.trainable_state_dict().items()})
            dense.append(adapted.delta_weights())
        state = _mean(replies)
        adapted.load_trainable_state_dict(state)
        exact, after = _mean(dense), adapted.delta_weights()
        gap += max(float((exact[n] - after[n]).abs().max()) for n in exact)
        change += max(float((exact[n] - before[n]).abs().max()) for n in exact)
    numbers = sum(tensor.numel() for tensor in state.values())
    return Averaging(gap / change, 4 * numbers, numbers)


def _train(module: nn.Module, client: int, server_round: int, seed: int) -> None:
    """Take SGD steps on the examples whose labels are ``client``'s."""
    train, _, _ = digits(seed, None)
    mine = (train.y % CLIENTS == client).nonzero().reshape(-1)
    generator = torch.Generator().manual_seed(1000 * seed + 10 * server_round + client)
    trained = [p for p in module.parameters() if p.requires_grad]
    for _ in range(_STEPS):
        rows = mine[torch.randint(len(mine), (_BATCH,), generator=generator)]
        loss = cross_entropy(module(train.x[rows]), train.y[rows])
        gradients = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.sub_(gradient, alpha=_RATE)


def _mean(states: list[dict[str, Tensor]] | list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([s[name].double() for s in states]).mean(0).float() for name in states[0]}
