"""What an EGGROLL federation sends: 20 bytes and 4 a pair, whatever the model; anything else is refused."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from turnout.wire import LayoutError, as_array
from turnout.wire.replies import encode_reply
from turnout.wire.seed_log import Fitness, LogEntry, log_record, read_log


@pytest.mark.parametrize("pairs", [0, 1, 20, 200])
def test_a_reply_is_20_bytes_and_4_a_pair(pairs: int) -> None:
    said = Fitness(3, 2**40 + 9, 60, np.arange(pairs, dtype=np.float32), 0xABCDEF, resync=pairs == 0)
    record = said.record()
    encoded = encode_reply(RecordDict({"fitness": record, "metrics": MetricRecord({"num-examples": 3})}), {})
    assert encoded.size == 20 + 4 * pairs
    read = Fitness.read(record)
    assert (read.server_round, read.client, read.first_pair) == (3, 9, 60)
    assert (read.search, read.resync) == (0xABCDEF, pairs == 0)
    assert np.array_equal(read.differences, said.differences)


@pytest.mark.parametrize("pairs", [1, 8, 20, 200])
def test_signs_are_20_bytes_and_a_bit_a_pair(pairs: int) -> None:
    differences = np.where(np.arange(pairs) % 3 == 0, np.float32(1.0), np.float32(-1.0))
    record = Fitness(3, 9, 60, differences, 0xABCDEF, signs=True).record()
    assert encode_reply(RecordDict({"fitness": record}), {}).size == 20 + (pairs + 7) // 8
    read = Fitness.read(record)
    assert read.about == (3, 9, 60, pairs, 0xABCDEF, True)
    assert np.array_equal(read.differences, differences)


def test_a_log_is_20_bytes_a_round_and_4_a_pair() -> None:
    entries = [
        LogEntry(4, np.array([0.5, -1.0], np.float32), 3),
        LogEntry(5, np.empty(0, np.float32), 3),
        LogEntry(6, np.array([2.0], np.float32), 4, checksum=0xFFFF_FFFF),
    ]
    record = log_record(entries)
    size = encode_reply(RecordDict({"log": record}), {}).size
    assert size == sum(entry.num_bytes for entry in entries) == 3 * 20 + 3 * 4
    for before, after in zip(entries, read_log(record), strict=True):
        assert np.array_equal(before.weights, after.weights)
        assert (before.server_round, before.steps, before.checksum) == (
            after.server_round,
            after.steps,
            after.checksum,
        )
    assert read_log(log_record([])) == []


def changed(record: ArrayRecord, **arrays: np.ndarray) -> ArrayRecord:
    other = ArrayRecord()
    for name in {**record, **arrays}:
        other[name] = as_array(arrays[name]) if name in arrays else record[name]
    return other


def test_what_is_no_reply_and_no_log_is_refused() -> None:
    record = Fitness(1, 2, 0, np.ones(3, np.float32), 5).record()
    signs = Fitness(1, 2, 0, np.ones(3, np.float32), 5, signs=True).record()
    words = np.array([1, 2, 0, 3, 5 << 8], np.uint32)
    for bad in (
        changed(record, differences=np.ones(2, np.float32)),
        changed(record, differences=np.ones((3, 1), np.float32)),
        changed(record, differences=np.ones(3)),
        changed(record, head=words[:4]),
        changed(record, head=words.astype(np.int64)),
        changed(record, head=words + np.uint32(2)),
        changed(record, more=np.ones(1)),
        changed(signs, signs=np.array([8], np.uint8)),  # A fourth pair.
        changed(signs, signs=np.zeros(2, np.uint8)),
        changed(signs, signs=np.ones(1, np.float32)),
        changed(signs, head=words),
        ArrayRecord(),
    ):
        with pytest.raises(LayoutError):
            Fitness.read(bad)
    log = log_record([LogEntry(1, np.ones(2, np.float32), 1)])
    for bad in (
        changed(log, weights=np.ones(3, np.float32)),
        changed(log, head=np.array([[1, 2**32 - 1, 0, 0, 1], [2, 3, 0, 0, 1]], np.uint32)),
        changed(log, head=np.zeros((1, 4), np.uint32)),
    ):
        with pytest.raises(LayoutError):
            read_log(bad)
