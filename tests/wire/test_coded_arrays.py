"""Coded tensors: whole numbers as digits, counts of steps, codes of a grid; bytes that are none of them."""

from __future__ import annotations

import contextlib
import math
import struct
from typing import Any

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.wire import LayoutError, view
from turnout.wire.digits import MOST_BASE, grouping, pack_digits, packed_size, unpack_digits
from turnout.wire.grid_codes import GRID_STYPE, as_grid_array
from turnout.wire.step_counts import STEP_COUNTS_STYPE, StepCounts, as_step_counts, step_counts_view

STEP = float(np.float32(0.003))


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.integers(1, 300), st.integers(1, MOST_BASE)), st.integers(0, 200), st.integers(0, 99))
def test_digits_come_back_and_take_hardly_more_than_their_bits(base: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, base, count, np.uint64)
    values[:1] = base - 1
    data = pack_digits(values, base)
    assert len(data) == packed_size(count, base)
    np.testing.assert_array_equal(unpack_digits(data, count, base), values)
    if base > 1:
        digits, size = grouping(base)
        assert len(data) == math.ceil(count / digits) * size
        assert base**digits <= 256**size < base ** (digits + 1) * 256


def test_bytes_that_are_no_digits_are_refused() -> None:
    with pytest.raises(LayoutError, match="no digits of base 41"):
        unpack_digits(b"\xff" * 7, 10, 41)
    with pytest.raises(LayoutError, match="are 7 bytes, got 8"):
        unpack_digits(b"\0" * 8, 10, 41)


def moved(old: Any, steps: int, seed: int) -> Any:
    """Return ``old`` after steps of STEP up, down or not at all, each of them rounded."""
    rng, new = np.random.default_rng(seed), old.copy()
    for _ in range(steps):
        new -= np.asarray(STEP * rng.integers(-1, 2, new.shape), new.dtype)
    return new


MASKS = [None, (5, 1), (1, 8), (5, 8)]


@pytest.mark.parametrize("marks", MASKS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("steps", [0, 1, 20, 200])
def test_step_counts_come_back(marks: Any, dtype: str, steps: int) -> None:
    """As ``old - step z`` rounded once: at most half a unit for each of the steps' own roundings away."""
    rng = np.random.default_rng(1)
    old = rng.standard_normal((5, 2, 4)).astype(dtype)
    new, whole = moved(old, steps, 2), None
    if marks is not None:
        whole = rng.random(marks) < 0.3
        other = rng.standard_normal((5, 8)) * whole
        new += other.reshape(new.shape).astype(dtype)
    array = as_step_counts(new, old, StepCounts(STEP, steps, whole))
    out = step_counts_view(array, old)
    assert (out.dtype, out.shape, out.flags.writeable) == (new.dtype, new.shape, False)
    held = 0 if whole is None else int(np.broadcast_to(whole, (5, 8)).sum())
    if whole is not None:
        places = np.broadcast_to(whole, (5, 8)).reshape(new.shape)
        np.testing.assert_array_equal(out[places], new[places])
    assert (np.abs(out - new) <= (steps + 1) / 2 * np.spacing(np.abs(old) + steps * STEP)).all()
    marked = 0 if marks is None else math.ceil(marks[0] * marks[1] / 8)
    expected = 16 + marked + held * old.itemsize + packed_size(40 - held, 2 * steps + 1)
    assert len(array.data) == expected
    again = as_step_counts(out, old, StepCounts(STEP, steps, whole))
    assert again.data == array.data, "what is decoded encodes to the same bytes"


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, 0)])
def test_tensors_of_every_dimension(shape: tuple[int, ...]) -> None:
    old = np.ones(shape, np.float32)
    new = moved(old, 3, 0)
    array = as_step_counts(new, old, StepCounts(STEP, 3))
    np.testing.assert_allclose(step_counts_view(array, old), new, rtol=1e-6)


def test_steps_below_the_numbers_precision_are_what_they_came_to() -> None:
    old = np.full((2, 3), 1e6, np.float32)  # Its neighbours are 0.0625 away: steps vanish.
    array = as_step_counts(old.copy(), old, StepCounts(STEP, 20))
    np.testing.assert_array_equal(step_counts_view(array, old), old)


def test_other_moves_are_no_steps() -> None:
    old = np.zeros((2, 2), np.float32)
    for change, words in ((0.5 * STEP, "the step"), (21 * STEP, "the step"), (math.nan, "finite")):
        new = old.copy()
        new[1, 0] = change
        with pytest.raises(LayoutError, match=words):
            as_step_counts(new, old, StepCounts(STEP, 20))


OLD = np.linspace(-1, 1, 40, dtype=np.float32).reshape(5, 8)
GOOD = as_step_counts(moved(OLD, 20, 0), OLD, StepCounts(STEP, 20, np.arange(8)[np.newaxis] < 2))


def headed(step: float = STEP, most: int = 20, axis: int = 2) -> bytes:
    return struct.pack("<dIB3x", step, most, axis) + GOOD.data[16:]


HOSTILE = [
    (b"", "lack their head"),
    (GOOD.data[:10], "lack their head"),
    (GOOD.data[:16], "lack their 8 marks"),
    (GOOD.data[:-1], "need .* bytes, got"),
    (GOOD.data + b"\0", "need .* bytes, got"),
    (GOOD.data[:17] + b"\xff" * (len(GOOD.data) - 17), "no digits of base 41"),
    (headed(step=math.nan), "not possible"),
    (headed(step=math.inf), "not possible"),
    (headed(step=-1.0), "not possible"),
    (headed(step=1e308, most=2**31 - 1), "not possible"),
    (headed(most=2**32 - 1), "not possible"),
    (headed(most=0), "need .* bytes, got"),
    (headed(most=2**31 - 1), "need .* bytes, got"),
    (headed(axis=7), "axis 7"),
    (headed(axis=0), "need .* bytes, got"),
]


@pytest.mark.parametrize(("data", "words"), HOSTILE)
def test_hostile_steps_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        step_counts_view(Array("float32", (5, 8), STEP_COUNTS_STYPE, data), OLD)


@pytest.mark.parametrize(
    ("dtype", "shape"), [("float64", (5, 8)), ("float16", (5, 8)), ("float32", (8, 5)), ("float32", (2**60,))]
)
def test_steps_of_another_tensor_are_refused(dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match="do not fit"):
        step_counts_view(Array(dtype, shape, STEP_COUNTS_STYPE, GOOD.data), OLD)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_are_read_or_refused(data: bytes, with_head: bool) -> None:
    """Nothing else is raised, and nothing warned of."""
    data = GOOD.data[:17] + data if with_head else data
    for read in (
        lambda: step_counts_view(Array("float32", (5, 8), STEP_COUNTS_STYPE, data), OLD),
        lambda: view(Array("float32", (5, 8), GRID_STYPE, data)),
    ):
        with contextlib.suppress(LayoutError):
            assert read().shape == (5, 8)


@pytest.mark.parametrize(("most", "bits"), [(127, 8), (7, 4), (1, 1.6), (3, 17 / 6), (100_000, 18.7)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_grid_codes_come_back(most: int, bits: float, dtype: str) -> None:
    rng = np.random.default_rng(3)
    codes, scales = rng.integers(-most, most + 1, (20, 6)), rng.random(40).astype(dtype)
    codes[0, 0] = -most
    array = as_grid_array(codes, scales)
    out = view(array)
    np.testing.assert_array_equal(out, (codes.reshape(40, 3).astype(dtype) * scales[:, None]).reshape(20, 6))
    assert not out.flags.writeable
    size = 8 + scales.nbytes + packed_size(120, 2 * most + 1)
    assert len(array.data) == size
    assert packed_size(120, 2 * most + 1) <= 120 * bits / 8 + 8


def test_every_finite_float_of_eight_bits_comes_back() -> None:
    torch = pytest.importorskip("torch")
    codes = np.arange(256, dtype=np.uint8)
    out = view(as_grid_array(codes, np.ones(1, np.float32)))
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(out, expected)


CODES = as_grid_array(np.arange(-20, 20).reshape(5, 8), np.ones(5, np.float32)).data


def declared(stretches: int, most: int) -> bytes:
    return struct.pack("<II", stretches, most) + CODES[8:]


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (CODES[:-1], 40),
        (CODES[:5], 40),
        (CODES, 2**40),
        (declared(0, 20), 40),
        (declared(3, 20), 40),
        (declared(2**32 - 1, 20), 40),
        (declared(5, 2**32 - 1), 40),
        (declared(5, 0), 40),
        (CODES[:28] + b"\xff" * (len(CODES) - 28), 40),
    ],
)
def test_hostile_codes_are_refused(data: bytes, count: int) -> None:
    with pytest.raises(LayoutError):
        view(Array("float32", (count,), GRID_STYPE, data))
