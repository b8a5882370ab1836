"""Checkpoints: a nested state tree as one safetensors file, written whole or not at all.

The file is the safetensors format (any safetensors reader opens the arrays). It is written array by array, so
that a state larger than memory can be saved; a SHA-256 over the whole file is checked when reading, so that a
flipped bit is refused and not trained on. Arrays that are one piece of memory (clients of one process that
hold one model) are written once. Rows that live in a file of their own (`RowFile`) are referred to,
made durable before the checkpoint is, and checked with it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from turnout.wire.arrays import NDArray
from turnout.wire.durable import sync_directory, unwritten
from turnout.wire.errors import CheckpointError
from turnout.wire.row_file import RowReference

_FORMAT: Final = "turnout-checkpoint-1"
_MAX_HEADER_BYTES: Final = 64 << 20
# The header begins with its own checksum, which covers everything around it.
_OPENING: Final = b'{"__metadata__": {"sha256": "'
_DIGEST_CHARACTERS: Final = 64
_DTYPES: Final = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16,
    "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_NAMES: Final = {np.dtype(kind): name for name, kind in _DTYPES.items()}
_BLOCK: Final = 16 << 20
_Places = dict[tuple[Any, ...], tuple[str, NDArray]]


def save_checkpoint(path: str | Path, tree: Mapping[str, Any]) -> None:
    """Write ``tree`` (nested mappings and lists of ndarrays, plain values, None and rows) to ``path``.

    The file appears complete and synced to disk, or the one that was there stays. Raises `CheckpointError`
    for a leaf that cannot be stored, naming it, and OSError when the disk refuses, naming file and size.
    """
    path = Path(path)
    arrays: dict[str, NDArray] = {}
    structure = json.dumps(_describe(tree, "", arrays, {}, path.parent), sort_keys=True)
    for rows in row_references(tree):
        rows.sync()
    # Larger elements first, so that every array lies aligned in the file.
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))
    header: dict[str, Any] = {}
    offset = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    metadata = {"sha256": "0" * _DIGEST_CHARACTERS, "format": _FORMAT, "tree": structure}
    raw = json.dumps({"__metadata__": metadata, **header}).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"checkpoint {path}: the state's description takes {len(raw)} bytes, at most {_MAX_HEADER_BYTES} "
            "can be read back; keep fewer separate arrays (memory='mmap' keeps all clients in one)."
        )
    closing = raw[len(_OPENING) + _DIGEST_CHARACTERS :]
    digest = _digest(closing, arrays.values())
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(raw).to_bytes(8, "little"))
            file.write(_OPENING + digest.encode() + closing)
            for array in arrays.values():
                for block in _blocks(array):
                    file.write(block)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise unwritten(error, path, 8 + len(raw) + offset) from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_checkpoint(path: str | Path, *, owned: bool = False) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; large arrays come back as copy-on-write memory maps.

    ``owned``: the caller owns the run that wrote it and goes on writing to the files of its rows.
    Raises `CheckpointError` when the file is missing, is no checkpoint, or does not match its checksum.
    """
    path = Path(path)
    try:
        raw, body = _read(path)
        closing = raw[len(_OPENING) + _DIGEST_CHARACTERS :]
        claimed = raw[len(_OPENING) : len(_OPENING) + _DIGEST_CHARACTERS]
        if not raw.startswith(_OPENING):
            raise CheckpointError(
                f"checkpoint {path}: not one of Turnout's, it does not open with a checksum."
            )
        if _digest(closing, [body]).encode() != claimed:
            raise CheckpointError(f"checkpoint {path}: checksum does not match, the file is damaged.")
        header = json.loads(raw)
        metadata = header.pop("__metadata__")
        if metadata["format"] != _FORMAT:
            raise CheckpointError(f"checkpoint {path}: format {metadata['format']!r}, expected {_FORMAT!r}.")
        arrays, end = {}, 0
        for name, entry in header.items():
            arrays[name], end = _array(path, body, entry, end)
        if end != len(body):
            raise CheckpointError(f"checkpoint {path}: {len(body) - end} bytes belong to no array.")
        tree: dict[str, Any] = _rebuild(json.loads(metadata["tree"]), arrays, path.parent, owned)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: {error.strerror or error}.") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path}: not a readable checkpoint ({error!r}).") from error
    for rows in row_references(tree):
        rows.verify()
    return tree


def row_references(tree: Any) -> Iterator[RowReference]:
    """Yield the references to rows in a checkpoint's tree."""
    if isinstance(tree, RowReference):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from row_references(value)


def _describe(node: Any, name: str, arrays: dict[str, NDArray], places: _Places, parent: Path) -> Any:
    """Return the JSON description of ``node``; arrays are collected under their path.

    ``places`` has them by their memory, which stays theirs as long as it names them.
    """
    if isinstance(node, Mapping):
        if any(not isinstance(key, str) for key in node):
            raise CheckpointError(f"checkpoint entry {name or '/'!r}: keys must be text.")
        # Escaped as in JSON pointers: {"a": {"b": x}, "a/b": y} must be two arrays.
        paths = {key: f"{name}/{key.replace('~', '~0').replace('/', '~1')}" for key in node}
        return {
            "map": {key: _describe(value, paths[key], arrays, places, parent) for key, value in node.items()}
        }
    if isinstance(node, RowReference):
        return {"rows": _describe(node.document(parent), name, arrays, places, parent)}
    if isinstance(node, np.ndarray):
        if node.dtype not in _NAMES:
            raise CheckpointError(f"checkpoint entry {name!r}: dtype {node.dtype} cannot be stored.")
        place = (node.__array_interface__["data"][0], node.shape, node.strides, node.dtype)
        if node.size and place in places:
            return {"array": places[place][0]}
        places[place] = name, node
        arrays[name] = node if _in_blocks(node) else np.ascontiguousarray(node)
        return {"array": name}
    if isinstance(node, (list, tuple)):
        values = [_describe(value, f"{name}/{i}", arrays, places, parent) for i, value in enumerate(node)]
        return {"list": values}
    if isinstance(node, np.generic):
        node = node.item()
    if node is None or isinstance(node, (bool, int, float, str)):
        return {"value": node}
    raise CheckpointError(f"checkpoint entry {name!r}: {type(node).__name__} cannot be stored.")


def _rebuild(node: dict[str, Any], arrays: Mapping[str, NDArray], parent: Path, owned: bool) -> Any:
    if "map" in node:
        return {key: _rebuild(value, arrays, parent, owned) for key, value in node["map"].items()}
    if "list" in node:
        return [_rebuild(value, arrays, parent, owned) for value in node["list"]]
    if "rows" in node:
        return RowReference.read(_rebuild(node["rows"], arrays, parent, owned), parent, owned=owned)
    return arrays[node["array"]] if "array" in node else node["value"]


def _read(path: Path) -> tuple[bytes, NDArray]:
    """Return the header and the bytes after it, which are mapped."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"checkpoint {path}: header length {length} does not fit the file.")
        raw = file.read(length)
    if size == 8 + length:
        return raw, np.empty(0, np.uint8)
    # One map for all: a process may have some 65 000 of them, fewer than a federation has clients.
    return raw, np.memmap(path, np.uint8, mode="c", offset=8 + length)


def _array(path: Path, body: NDArray, entry: Mapping[str, Any], expected: int) -> tuple[NDArray, int]:
    """Return the array that ``entry`` describes as a view of ``body``, and where it ends."""
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if begin != expected or end - begin != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
        raise CheckpointError(f"checkpoint {path}: offsets {begin}:{end} do not fit shape {shape}.")
    if end > len(body):
        raise CheckpointError(f"checkpoint {path}: the file ends {end - len(body)} bytes too early.")
    if end == begin:
        return np.empty(shape, dtype), end
    return np.ndarray(shape, dtype, buffer=body.data, offset=begin), end


def _in_blocks(array: NDArray) -> bool:
    """Return whether `_blocks` can go through ``array`` without a copy of the whole."""
    return array.flags.c_contiguous or (array.ndim == 2 and array[:1].flags.c_contiguous)


def _blocks(array: NDArray) -> Iterator[memoryview]:
    if array.size == 0:
        return
    if not array.flags.c_contiguous:  # Rows that lie apart: as many at a time as fill a block.
        together = max(1, _BLOCK // array[:1].nbytes)
        for start in range(0, len(array), together):
            yield from _blocks(np.ascontiguousarray(array[start : start + together]))
        return
    raw = array.reshape(-1).view(np.uint8).data
    for start in range(0, len(raw), _BLOCK):
        yield raw[start : start + _BLOCK]


def _digest(closing: bytes, arrays: Iterable[NDArray]) -> str:
    """Return the SHA-256 of the header's length, the header after its checksum, and the arrays."""
    digest = hashlib.sha256(len(closing).to_bytes(8, "little") + closing)
    for array in arrays:
        for block in _blocks(array):
            digest.update(block)
    return digest.hexdigest()
