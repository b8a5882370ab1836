"""Turnout on Flower's engines, SuperLink and Ray: the grid inside a Flower ``ServerApp``."""

from __future__ import annotations

from turnout.server.commit import CommitCallback
from turnout.server.flower.grid import FlowerGrid

__all__ = ["CommitCallback", "FlowerGrid"]
