"""Files that are made to cost or to deceive are refused before anything is allocated for them."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from turnout.wire import CheckpointError, load_checkpoint

OPENING = '{"__metadata__": {"sha256": "'


def write(path: Path, entries: str, body: bytes, *, tree: str = '{"map": {}}') -> None:
    """Write a file with a correct checksum, so that what is inside is looked at."""
    closing = f'", "format": "turnout-checkpoint-1", "tree": {json.dumps(tree)}}}{entries}}}'.encode()
    closing += b" " * (-(len(OPENING) + 64 + len(closing)) % 8)
    digest = hashlib.sha256(len(closing).to_bytes(8, "little") + closing + body).hexdigest()
    header = OPENING.encode() + digest.encode() + closing
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)


def entry(name: str, begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> str:
    shape = [(end - begin) // 4] if shape is None else shape
    return f', "{name}": {json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})}'


FILES = {
    "overlapping": (entry("a", 0, 8) + entry("b", 4, 12), bytes(12)),
    "gap": (entry("a", 0, 4) + entry("b", 8, 12), bytes(12)),
    "trailing": (entry("a", 0, 4), bytes(8)),
    "too-short": (entry("a", 0, 400), bytes(8)),
    "reversed": (entry("a", 4, 0), bytes(4)),
    "negative-shape": (entry("a", 0, 4, [-1, -1]), bytes(4)),
    "huge-shape": (entry("a", 0, 2**62, [2**60]), bytes(4)),
    "product-beyond-64-bits": (entry("a", 0, 4, [2**40, 2**40]), bytes(4)),
    "zero-beside-huge": (entry("a", 0, 0, [0, 2**62]) + entry("b", 0, 4), bytes(4)),
    "text-for-a-length": (entry("a", 0, 4, ["1"]), bytes(4)),
    "unknown-dtype": (entry("a", 0, 4, [1], "pickle"), bytes(4)),
    "not-an-object": (', "a": 3', b""),
}


@pytest.mark.parametrize("kind", FILES)
def test_crafted_offsets_and_shapes_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, *FILES[kind])
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_the_crafted_files_are_read_when_they_are_in_order(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, entry("/a", 0, 4), bytes(4), tree='{"map": {"a": {"array": "/a"}}}')
    assert load_checkpoint(path)["a"].tolist() == [0]


def test_a_tree_that_names_no_array_or_never_ends_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for tree in ('{"array": "/b"}', "[" * 100_000, '{"list": 5}', "null", '{"list": [' * 5000):
        write(path, entry("/a", 0, 4), bytes(4), tree=tree)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


@pytest.mark.parametrize("length", [100 << 20, (64 << 20) + 1, 2**63, 2**64 - 1])
def test_a_huge_header_is_refused_unread(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:  # Sparse: it takes no space.
        file.write(length.to_bytes(8, "little") + OPENING.encode())
        file.truncate(8 + min(length, 101 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="header length"):
            load_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_hundred_thousand_entries_are_read_in_bounded_time(tmp_path: Path) -> None:
    """They are allowed, since a federation may have that many clients; but they must be in order too."""
    path = tmp_path / "x.safetensors"
    rows = "".join(entry(f"/{i}", 4 * i, 4 * i + 4) for i in range(100_000))
    write(path, rows, bytes(400_000))
    assert load_checkpoint(path) == {}
    write(path, rows, bytes(400_004))
    with pytest.raises(CheckpointError, match="belong to no array"):
        load_checkpoint(path)
