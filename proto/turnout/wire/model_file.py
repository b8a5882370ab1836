"""A model as a safetensors file: any reader opens it, and the order of its arrays is kept."""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import ArrayRecord
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from turnout.wire.arrays import as_array, view
from turnout.wire.errors import CheckpointError


def model_bytes(arrays: ArrayRecord) -> bytes:
    """Return the content of a file with ``arrays``."""
    tensors = {name: view(array) for name, array in arrays.items()}
    return save(tensors, {"format": "pt", "names": json.dumps(list(tensors))})


def read_model(path: str | Path) -> ArrayRecord:
    """Return the arrays of a safetensors file, which may be another program's.

    Raises `CheckpointError` for a file that cannot be read.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            names = json.loads(metadata["names"]) if "names" in metadata else list(file.keys())
            return ArrayRecord({name: as_array(file.get_tensor(name)) for name in names})
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise CheckpointError(f"model file {path} cannot be read: {error}.") from error
