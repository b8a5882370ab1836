"""Linear layers of which selected input columns, or output rows, are trained: what PaCA and S2FT share.

The frozen product and the product of the selected part are separate, so that autograd keeps the selected
inputs only, of shape (..., s), instead of all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def pick(x: Tensor, index: Tensor, dim: int = -1) -> Tensor:
    """Return ``x`` at ``index`` along ``dim``: a view where the indices are a range, else a copy."""
    if len(index) and _is_range(index):
        return x.narrow(dim, int(index[0]), len(index))
    return x.index_select(dim, index)


def add_inputs(base: Tensor, x: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    """Return ``base + x[..., index] delta^T``; delta has shape (d_out, s)."""
    return base + linear(pick(x, index).to(delta.dtype), delta).to(base.dtype)


def add_outputs(base: Tensor, x: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    """Return ``base`` with ``x delta^T`` added to its outputs ``index``; delta has shape (s, d_in)."""
    return base.index_add(-1, index, linear(x.to(delta.dtype), delta).to(base.dtype))


def dense(shape: torch.Size, dim: int, index: Tensor, delta: Tensor) -> Tensor:
    """Return zeros of ``shape`` with ``delta`` at ``index`` along ``dim``, differentiable."""
    return delta.new_zeros(shape).index_add(dim, index, delta)


def _is_range(index: Tensor) -> bool:
    return index.device.type == "cpu" and bool((index.diff() == 1).all())
