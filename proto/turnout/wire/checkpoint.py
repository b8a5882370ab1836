"""Checkpoints: a nested state tree as one safetensors file, written whole or not at all.

The file is the safetensors format (any safetensors reader opens the arrays). It is written array by array, so
that a state larger than memory (a memory-mapped per-client store) can be saved; a SHA-256 over the arrays
and the tree's description is checked when reading, so that a flipped bit is refused and not trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from turnout.wire.arrays import NDArray
from turnout.wire.errors import CheckpointError

_FORMAT: Final = "turnout-checkpoint-1"
_MAX_HEADER_BYTES: Final = 64 << 20
_DTYPES: Final = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16,
    "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_NAMES: Final = {np.dtype(kind): name for name, kind in _DTYPES.items()}
_BLOCK: Final = 16 << 20


def save_checkpoint(path: str | Path, tree: Mapping[str, Any]) -> None:
    """Write ``tree`` (nested mappings of ndarrays, numbers, strings, booleans, None and lists) to ``path``.

    The file appears complete and synced to disk, or the one that was there stays. Raises `CheckpointError`
    for a leaf that cannot be stored, naming it, and OSError when the disk refuses.
    """
    path = Path(path)
    arrays: dict[str, NDArray] = {}
    structure = json.dumps(_describe(tree, "", arrays), sort_keys=True)
    header, offset = {}, 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    metadata = {"format": _FORMAT, "tree": structure, "sha256": _digest(structure, arrays)}
    raw = json.dumps({"__metadata__": metadata, **header}).encode()
    raw += b" " * (-len(raw) % 8)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(raw).to_bytes(8, "little"))
            file.write(raw)
            for array in arrays.values():
                for block in _blocks(array):
                    file.write(block)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; large arrays come back as copy-on-write memory maps.

    Raises `CheckpointError` when the file is missing, is no checkpoint, or does not match its checksum.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"checkpoint {path}: header length {length} does not fit the file.")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        if metadata["format"] != _FORMAT:
            raise CheckpointError(f"checkpoint {path}: format {metadata['format']!r}, expected {_FORMAT!r}.")
        start = 8 + length
        arrays = {name: _map(path, start, entry, size) for name, entry in header.items()}
        if _digest(metadata["tree"], arrays) != metadata["sha256"]:
            raise CheckpointError(f"checkpoint {path}: checksum does not match, the file is damaged.")
        tree: dict[str, Any] = _rebuild(json.loads(metadata["tree"]), arrays)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path}: no such file.") from error
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint {path}: not a readable checkpoint ({error}).") from error
    return tree


def sync_directory(directory: Path) -> None:
    """Make a rename inside ``directory`` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _describe(node: Any, name: str, arrays: dict[str, NDArray]) -> Any:
    """Return the JSON description of ``node``; arrays are collected under their path."""
    if isinstance(node, Mapping):
        if any(not isinstance(key, str) for key in node):
            raise CheckpointError(f"checkpoint entry {name or '/'!r}: keys must be text.")
        return {"map": {key: _describe(value, f"{name}/{key}", arrays) for key, value in node.items()}}
    if isinstance(node, np.ndarray):
        if node.dtype not in _NAMES:
            raise CheckpointError(f"checkpoint entry {name!r}: dtype {node.dtype} cannot be stored.")
        arrays[name] = node if node.flags.c_contiguous else np.ascontiguousarray(node)
        return {"array": name}
    if isinstance(node, (list, tuple)):
        return {"list": [_describe(value, f"{name}/{i}", arrays) for i, value in enumerate(node)]}
    if isinstance(node, np.generic):
        node = node.item()
    if node is None or isinstance(node, (bool, int, float, str)):
        return {"value": node}
    raise CheckpointError(f"checkpoint entry {name!r}: {type(node).__name__} cannot be stored.")


def _rebuild(node: dict[str, Any], arrays: Mapping[str, NDArray]) -> Any:
    if "map" in node:
        return {key: _rebuild(value, arrays) for key, value in node["map"].items()}
    if "list" in node:
        return [_rebuild(value, arrays) for value in node["list"]]
    return arrays[node["array"]] if "array" in node else node["value"]


def _map(path: Path, start: int, entry: Mapping[str, Any], file_size: int) -> NDArray:
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if begin < 0 or end - begin != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise CheckpointError(f"checkpoint {path}: offsets {begin}:{end} do not fit shape {shape}.")
    if start + end > file_size:
        raise CheckpointError(f"checkpoint {path}: the file ends {start + end - file_size} bytes too early.")
    if end == begin:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="c", offset=start + begin, shape=shape)


def _blocks(array: NDArray) -> list[memoryview]:
    if array.size == 0:
        return []
    raw = array.reshape(-1).view(np.uint8).data
    return [raw[i : i + _BLOCK] for i in range(0, len(raw), _BLOCK)]


def _digest(structure: str, arrays: Mapping[str, NDArray]) -> str:
    digest = hashlib.sha256(structure.encode())
    for array in arrays.values():
        for block in _blocks(array):
            digest.update(block)
    return digest.hexdigest()
