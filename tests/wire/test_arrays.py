"""Arrays in and out without copies, bfloat16 rounding, and bytes that do not hold what they declare."""

from __future__ import annotations

import struct
from io import BytesIO

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from flwr.app import Array
from hypothesis import example, given
from hypothesis import strategies as st

from turnout.wire import LayoutError, as_array, as_bf16_array, view

NUMPY = "numpy.ndarray"
DTYPES = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint64", "bool"]


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    buffer = BytesIO()
    np.lib.format.write_array(buffer, array, version=version, allow_pickle=False)
    return buffer.getvalue()


def header(descr: str, shape: tuple[int, ...]) -> str:
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}"


def crafted(header: str) -> bytes:
    """npy bytes whose header is this text, with eight bytes of data."""
    raw = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + b"\0" * 8


class TestView:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 4)])
    def test_stock_arrays_are_read_without_a_copy(self, dtype: str, shape: tuple[int, ...]) -> None:
        content = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
        array = Array(content)
        seen = view(array)
        np.testing.assert_array_equal(seen, content)
        assert (seen.dtype, seen.shape) == (content.dtype, content.shape)
        assert not seen.flags.writeable
        if content.size:
            assert np.shares_memory(seen, np.frombuffer(array.data, np.uint8))

    def test_our_arrays_are_read_without_a_copy(self) -> None:
        content = np.arange(6.0)
        seen = view(as_array(content))
        assert np.shares_memory(seen, content)
        assert not seen.flags.writeable
        assert content.flags.writeable  # The caller's own array is left alone.

    def test_big_endian_and_fortran_order_keep_their_values(self) -> None:
        content = np.arange(6, dtype=">f4").reshape(2, 3)
        np.testing.assert_array_equal(view(Array("float32", (2, 3), NUMPY, npy(content))), content)
        fortran = np.asfortranarray(np.arange(6.0).reshape(2, 3))
        np.testing.assert_array_equal(view(Array("float64", (2, 3), NUMPY, npy(fortran))), fortran)

    def test_second_npy_version(self) -> None:
        content = np.arange(4.0)
        np.testing.assert_array_equal(view(Array("float64", (4,), NUMPY, npy(content, (2, 0)))), content)

    @given(hnp.arrays(st.sampled_from([np.float32, np.float64, np.int64]), hnp.array_shapes(max_dims=3)))
    def test_round_trip(self, content: np.ndarray) -> None:
        for array in (Array(content), as_array(content)):
            assert view(array).tobytes() == content.tobytes()


GOOD = npy(np.arange(6, dtype=np.float32).reshape(2, 3))
LIES = {
    "declared shape": Array("float32", (3, 2), NUMPY, GOOD),
    "declared too large": Array("float32", (200, 300), NUMPY, GOOD),
    "truncated data": Array("float32", (2, 3), NUMPY, GOOD[:-1]),
    "truncated header": Array("float32", (2, 3), NUMPY, GOOD[:30]),
    "trailing bytes": Array("float32", (2, 3), NUMPY, GOOD + b"\0"),
    "empty": Array("float32", (0,), NUMPY, b""),
    "not npy": Array("float32", (2, 3), NUMPY, b"PK" + GOOD),
    "unknown version": Array("float32", (2, 3), NUMPY, GOOD[:6] + b"\x09\x00" + GOOD[8:]),
    "object dtype": Array("object", (1,), NUMPY, crafted(header("|O", (1,)))),
    "text dtype": Array("<U2", (1,), NUMPY, npy(np.array(["ab"]))),
    "complex dtype": Array("complex64", (1,), NUMPY, npy(np.zeros(1, np.complex64))),
    "structured dtype": Array("V8", (1,), NUMPY, npy(np.zeros(1, np.dtype([("a", "<f8")])))),
    "dates": Array("datetime64", (1,), NUMPY, npy(np.zeros(1, "datetime64[s]"))),
    "huge shape in the header": Array(
        "float64", (1,), NUMPY, crafted(header("<f8", (2**70,)))
    ),
    "huge shape declared": Array(
        "float64", (2**70,), NUMPY, crafted(header("<f8", (2**70,)))
    ),
    "overflowing product": Array(
        "float64", (2**62, 4), NUMPY, crafted(header("<f8", (2**62, 4)))
    ),
    "negative shape": Array(
        "float32", (-1, -2), NUMPY, crafted(header("<f4", (-1, -2)))
    ),
    "unhashable key": Array("float64", (1,), NUMPY, crafted("{[]: 1}")),
    "unclosed bracket": Array("float64", (1,), NUMPY, crafted("{'descr': (((((")),
    "odd indent": Array("float64", (1,), NUMPY, crafted("  a\n b\n")),
    "a call": Array("float64", (1,), NUMPY, crafted("__import__('os').system('true')")),
    "deep nesting": Array("float64", (1,), NUMPY, crafted("(" * 9000)),
    "long sum": Array("float64", (1,), NUMPY, crafted("-" * 9000 + "1")),
    "bf16 too short": Array("bfloat16", (3,), "turnout.bf16", b"\0" * 5),
    "bf16 too long": Array("bfloat16", (3,), "turnout.bf16", b"\0" * 8),
    "bf16 huge": Array("bfloat16", (2**40, 2**40), "turnout.bf16", b""),
    "bf16 negative": Array("bfloat16", (-1, -1), "turnout.bf16", b"\0\0"),
    "unknown stype": Array("float32", (2, 3), "elsewhere.zip", GOOD),
}  # fmt: skip


class TestLyingBytes:
    @pytest.mark.parametrize("name", LIES)
    def test_refused_with_a_layout_error(self, name: str) -> None:
        with pytest.raises(LayoutError):
            view(LIES[name])

    @given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=24))
    @example(8, b"\xff\xff")
    @example(10, b"{[]:0}#")
    def test_whatever_overwrites_the_bytes_only_a_layout_error_comes_out(
        self, start: int, piece: bytes
    ) -> None:
        data = GOOD[:start] + piece + GOOD[start + len(piece) :]
        try:
            seen = view(Array("float32", (2, 3), NUMPY, data))
        except LayoutError:
            return
        assert seen.shape == (2, 3)

    @given(st.binary(max_size=80))
    def test_header_text_of_any_kind(self, text: bytes) -> None:
        data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"\0" * 8
        try:
            view(Array("float64", (1,), NUMPY, data))
        except LayoutError:
            return


SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38, 3.3961775e38, 1.0, 1.00390625, 1.01171875],
    np.float32,
)


def torch_bf16(content: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(content.copy()).to(torch.bfloat16).to(torch.float32)
    return rounded.numpy()


class TestBfloat16:
    def assert_like_torch(self, content: np.ndarray) -> None:
        ours, theirs = view(as_bf16_array(content)), torch_bf16(content)
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
        number = ~np.isnan(theirs)
        np.testing.assert_array_equal(ours[number].view(np.uint32), theirs[number].view(np.uint32))

    def test_special_values(self) -> None:
        self.assert_like_torch(SPECIAL)

    def test_every_rounding_boundary(self) -> None:
        # All upper halves, with lower halves around the tie.
        upper = np.arange(0, 2**16, 7, dtype=np.uint32) << 16
        for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
            self.assert_like_torch((upper | lower).view(np.float32))

    def test_a_nan_never_becomes_infinity(self) -> None:
        payloads = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7F80FFFF], np.uint32)
        assert np.isnan(view(as_bf16_array(payloads.view(np.float32)))).all()

    @given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3), elements=st.floats(width=32)))
    def test_like_torch(self, content: np.ndarray) -> None:
        self.assert_like_torch(content)

    @pytest.mark.parametrize(
        "content",
        [
            np.float32(1.25).reshape(()),
            np.full((), np.nan, np.float32),
            np.empty((0, 2), np.float32),
            np.arange(12, dtype=np.float32).reshape(3, 4).T,
            np.arange(9, dtype=np.float32)[::2],
        ],
        ids=["scalar", "nan scalar", "empty", "transposed", "strided"],
    )
    def test_shapes_and_strides(self, content: np.ndarray) -> None:
        array = as_bf16_array(content)
        assert (array.dtype, array.shape, array.stype) == ("bfloat16", content.shape, "turnout.bf16")
        np.testing.assert_array_equal(view(array), content)

    def test_what_is_bf16_already_survives_unchanged(self) -> None:
        content = torch_bf16(np.random.default_rng(0).standard_normal(1000).astype(np.float32))
        np.testing.assert_array_equal(view(as_bf16_array(content)), content)
