"""Optimizers, one file per paper: ``torch.optim.Optimizer`` subclasses for any PyTorch code."""

from __future__ import annotations

from turnout.optim.eggroll import EGGROLL

__all__ = ["EGGROLL"]
