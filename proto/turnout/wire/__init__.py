"""What travels: parameter layout, records, checkpoints, and the fence around Flower's private parts."""

from __future__ import annotations

import os

# Read when gRPC is imported. Its handlers start threads in a forked child, which hang there or end it.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from turnout.wire.arrays import NDArray, as_array, as_bf16_array, as_sign_array, view
from turnout.wire.checkpoint import load_checkpoint, save_checkpoint
from turnout.wire.digests import shared_digest
from turnout.wire.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LayoutError,
    ReplyRejected,
    TurnoutError,
    unknown_name,
)
from turnout.wire.layout import ParameterLayout, TensorSpec
from turnout.wire.registry import MethodEntry, find, methods, register

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LayoutError",
    "MethodEntry",
    "NDArray",
    "ParameterLayout",
    "ReplyRejected",
    "TensorSpec",
    "TurnoutError",
    "as_array",
    "as_bf16_array",
    "as_sign_array",
    "find",
    "load_checkpoint",
    "methods",
    "register",
    "save_checkpoint",
    "shared_digest",
    "unknown_name",
    "view",
]
