"""Columns: what is kept about many clients, and how little of it a checkpoint stores."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.wire import CheckpointError
from turnout.wire.columns import Column, pack, unpack

MANY = 100_000


def stored(tree: dict[str, Any]) -> int:
    """Bytes of the arrays in a short form."""
    return sum(value.nbytes for value in tree.values() if isinstance(value, np.ndarray))


class TestColumn:
    def test_grows_and_fills(self) -> None:
        column = Column(np.int64, -1)
        column.reach(3)
        column[1] = 7
        assert column.values.tolist() == [-1, 7, -1]
        assert column.append(5) == 3
        column.reach(2)  # Never shrinks.
        assert (len(column), column[3], column.nbytes) == (4, 5, 32)

    def test_grows_by_doubling(self) -> None:
        column = Column(np.int64)
        buffers = set()
        for value in range(10_000):
            column.append(value)
            buffers.add(column.values.__array_interface__["data"][0])
        assert len(buffers) < 15
        assert column.values.tolist() == list(range(10_000))

    @pytest.mark.parametrize("row", [-1, 3])
    def test_rows_that_do_not_exist(self, row: int) -> None:
        column = Column(np.int64)
        column.reach(3)
        with pytest.raises(IndexError, match=f"row {row} of 3"):
            column[row]

    def test_state_round_trip(self) -> None:
        column, other = Column(np.float64, 1.0), Column(np.float64, 1.0)
        column.reach(9)
        column[4] = 0.1
        other.load_state_dict(column.state_dict())
        assert other.values.tolist() == column.values.tolist()
        assert other.append(3.0) == 9


class TestPacked:
    @given(
        st.sampled_from([np.int64, np.uint64, np.uint8, np.float64]).flatmap(
            lambda dtype: hnp.arrays(dtype, st.integers(0, 30), fill=st.nothing())
        )
    )
    def test_any_column_comes_back_bit_for_bit(self, values: np.ndarray) -> None:
        again = unpack(pack(values), values.dtype)
        assert (again.dtype, again.tobytes()) == (values.dtype, values.tobytes())

    @pytest.mark.parametrize(
        ("values", "most"),
        [
            (np.arange(MANY), 0),
            (np.arange(MANY, dtype=np.uint64) + np.uint64(2**64 - MANY), 0),
            (np.full(MANY, 7), 8),
            (np.full(MANY, 0.1), 8),
            (np.arange(MANY) % 200, MANY),
            (np.where(np.arange(MANY) % 100, 0, np.arange(MANY)), 8 * MANY // 100 + 8),
            (np.linspace(0, 1, MANY).astype(np.float32).astype(np.float64), 4 * MANY),
        ],
    )
    def test_little_is_stored(self, values: np.ndarray, most: int) -> None:
        tree = pack(values)
        assert stored(tree) <= most
        assert unpack(tree, values.dtype).tobytes() == values.tobytes()

    def test_signs_of_zero_and_nan_are_kept(self) -> None:
        values = np.array([-0.0, 0.0, np.nan, -0.0] * 3)
        assert unpack(pack(values), np.float64).tobytes() == values.tobytes()

    @pytest.mark.parametrize(
        "tree",
        [
            {},
            {"count": -1},
            {"count": 2**40, "from": 0},
            {"count": 3, "values": np.zeros(2, np.int8)},
            {"count": 3, "values": "no"},
            {"count": 3, "first": np.zeros(1), "rows": np.array([3]), "values": np.array([1])},
        ],
    )
    def test_what_is_no_column_is_refused(self, tree: dict[str, Any]) -> None:
        with pytest.raises(CheckpointError, match="a column in the checkpoint is not readable"):
            unpack(tree, np.int64)
