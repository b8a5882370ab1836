from __future__ import annotations

import random
import zlib

import numpy as np
import pytest

from turnout.wire.checksums import add_chunk, checksum
from turnout.wire.framing import CHUNK_BYTES


def pieces(data: bytes, cuts: list[int]) -> list[memoryview]:
    whole = memoryview(data)
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@pytest.mark.parametrize(
    "size", [0, 1, 100, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7]
)
def test_where_the_pieces_are_cut_does_not_matter(size: int) -> None:
    data = random.Random(size).randbytes(size)
    rng = random.Random(1)
    cuts = sorted(rng.randrange(size + 1) for _ in range(5))
    by_chunks = 0
    for at in range(0, size, CHUNK_BYTES):
        by_chunks = add_chunk(by_chunks, data[at : at + CHUNK_BYTES])
    assert checksum(pieces(data, cuts)) == checksum([memoryview(data)]) == by_chunks


def test_a_part_of_a_chunk_is_an_ordinary_crc() -> None:
    assert checksum([memoryview(b"123456789")]) == zlib.crc32(b"123456789") == 0xCBF43926


def test_every_damage_within_64_kib_shows() -> None:
    rng = np.random.default_rng(7)
    data = rng.integers(0, 256, 2 * CHUNK_BYTES + 1000, dtype=np.uint8)
    good = checksum([data.data])
    for _ in range(300):
        damaged = data.copy()
        begin = int(rng.integers(data.size))
        length = int(min(rng.choice([1, 2, 9, 4000, 65_536]), data.size - begin))
        damaged[begin : begin + length] ^= rng.integers(0, 256, length, dtype=np.uint8)
        damaged[begin] ^= np.uint8(1 << rng.integers(8))
        if np.array_equal(damaged, data):
            continue
        assert checksum([damaged.data]) != good


def test_exchanged_chunks_show() -> None:
    data = np.random.default_rng(3).integers(0, 256, 2 * CHUNK_BYTES, dtype=np.uint8)
    exchanged = np.concatenate([data[CHUNK_BYTES:], data[:CHUNK_BYTES]])
    assert checksum([data.data]) != checksum([exchanged.data])
