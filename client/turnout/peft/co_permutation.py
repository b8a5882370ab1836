"""Permutations of coupled weights that leave a block's function as it is (S2FT, arXiv 2412.06289, step 2).

Channels of a feed-forward block and heads of an attention are interchangeable: reordering the rows of what
makes them and the columns of what reads them changes nothing. All functions work in place and permute biases
along with rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from turnout.wire.errors import ConfigError


def selected_first(picked: Tensor, channels: int) -> Tensor:
    """Return the order of ``channels`` with the ``picked`` ones, shape (s,), in front; others keep theirs."""
    rest = torch.ones(channels, dtype=torch.bool)
    rest[picked] = False
    return torch.cat([picked, rest.nonzero().reshape(-1)])


def permute_channels(makers: Sequence[nn.Linear], reader: nn.Linear, order: Tensor) -> None:
    """Reorder the channels between ``makers`` (up, gate: their rows) and ``reader`` (down: its columns)."""
    for maker in makers:
        _rows(maker, order)
    _columns(reader, order)


def permute_heads(
    query: nn.Linear, key: nn.Linear, value: nn.Linear, output: nn.Linear, order: Tensor, *, kv_heads: int
) -> None:
    """Reorder the key-value heads of an attention, and with each the group of query heads that it serves.

    ``order`` is a permutation of ``kv_heads``. Raises `ConfigError` when the widths are not multiples of it.
    """
    for name, width in (("key", key.out_features), ("query", query.out_features)):
        if width % kv_heads:
            raise ConfigError(f"kv_heads={kv_heads} does not divide the {width} outputs of {name}.")
    _rows(query, _blocks(order, query.out_features // kv_heads))
    _rows(key, _blocks(order, key.out_features // kv_heads))
    _rows(value, _blocks(order, value.out_features // kv_heads))
    _columns(output, _blocks(order, output.in_features // kv_heads))


def _blocks(order: Tensor, width: int) -> Tensor:
    return (order[:, None] * width + torch.arange(width)).reshape(-1)


def _rows(linear: nn.Linear, order: Tensor) -> None:
    with torch.no_grad():
        linear.weight.copy_(linear.weight[order])
        if linear.bias is not None:
            linear.bias.copy_(linear.bias[order])


def _columns(linear: nn.Linear, order: Tensor) -> None:
    with torch.no_grad():
        linear.weight.copy_(linear.weight[:, order])
