"""`ParameterLayout`: one flat vector in and out, without copies, and nothing that does not fit."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

from turnout.wire import LayoutError, ParameterLayout, as_array, as_bf16_array
from turnout.wire.arrays import LEADING_STYPE, as_leading_array
from turnout.wire.packing import pack

SHAPES = {"conv.weight": (4, 3, 2), "conv.bias": (4,), "scale": (), "none": (0, 5), "fc.weight": (2, 4)}
BUFFERS = {
    "bn.running_mean": np.array([0.5, 1.5], np.float32),
    "bn.running_var": np.array([1.0, 2.0], np.float64),
    "bn.num_batches_tracked": np.array(7, np.int64),
    "steps": np.array([1, 2], np.int32),
    "mask": np.array([True, False]),
}


def model(dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def stock(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def with_bf16(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: as_bf16_array(value) for name, value in arrays.items()})


def ours(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    """Our lazy arrays; the constructor of ``ArrayRecord`` would encode them."""
    record = ArrayRecord()
    for name, value in arrays.items():
        record[name] = as_array(value)
    return record


class TestReading:
    def test_order_offsets_and_size(self) -> None:
        layout = ParameterLayout.from_arrays(stock(model()))
        assert [t.name for t in layout.tensors] == list(SHAPES)
        assert [t.offset for t in layout.tensors] == [0, 24, 28, 29, 29]
        assert [t.size for t in layout.tensors] == [24, 4, 1, 0, 8]
        assert layout.size == 37
        assert layout.dtype == np.float32

    def test_buffers_stay_beside_the_vector(self) -> None:
        arrays = model() | BUFFERS
        layout = ParameterLayout.from_arrays(stock(arrays))
        assert layout.size == 37
        assert [b.name for b in layout.buffers] == list(BUFFERS)
        record = stock(arrays)
        vector, buffers = layout.flatten(record), layout.buffers_of(record)
        again = layout.record(vector, buffers)
        assert set(again) == set(arrays)
        for name, expected in arrays.items():
            np.testing.assert_array_equal(again[name].numpy(), expected)
            assert again[name].dtype == expected.dtype.name

    def test_buffers_can_be_named(self) -> None:
        layout = ParameterLayout.from_arrays(stock(model()), buffer_names={"scale"})
        assert [b.name for b in layout.buffers] == ["scale"]
        assert layout.size == 36

    def test_a_model_without_float_parameters_is_refused(self) -> None:
        with pytest.raises(LayoutError, match="no float parameter"):
            ParameterLayout.from_arrays(stock({"steps": np.array([1])}))

    @pytest.mark.parametrize(
        ("dtypes", "expected"),
        [(["float32"], "float32"), (["float16"], "float32"), (["float32", "float64"], "float64")],
    )
    def test_vector_precision(self, dtypes: list[str], expected: str) -> None:
        arrays = {f"w{i}": np.zeros(2, dtype) for i, dtype in enumerate(dtypes)}
        assert ParameterLayout.from_arrays(stock(arrays)).dtype == expected

    def test_digest_tells_layouts_apart(self) -> None:
        base = ParameterLayout.from_arrays(stock(model()))
        assert base.digest == ParameterLayout.from_arrays(stock(model())).digest
        others = [
            {f"x{name}": value for name, value in model().items()},
            dict(reversed(model().items())),
            model("float64"),
            model() | {"steps": np.array([1])},
            model() | {"scale": np.zeros((1,), np.float32)},
        ]
        digests = {ParameterLayout.from_arrays(stock(arrays)).digest for arrays in others}
        assert len(digests | {base.digest}) == len(others) + 1


class TestZeroCopy:
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_both_ways(self, dtype: str) -> None:
        layout = ParameterLayout.from_arrays(stock(model(dtype)))
        vector = np.arange(layout.size, dtype=dtype)
        record = layout.record(vector)
        back = layout.flatten(record)
        assert np.shares_memory(back, vector)
        assert back.ctypes.data == vector.ctypes.data
        assert not back.flags.writeable
        np.testing.assert_array_equal(back, vector)
        for name, block in layout.split(vector).items():
            assert block.shape == SHAPES[name]
            assert block.size == 0 or np.shares_memory(block, vector)

    def test_single_tensor_from_the_network(self) -> None:
        array = Array(np.arange(6, dtype=np.float32).reshape(2, 3))
        record = ArrayRecord({"w": array})
        vector = ParameterLayout.from_arrays(record).flatten(record)
        assert np.shares_memory(vector, np.frombuffer(array.data, np.uint8))

    def test_a_view_into_a_larger_vector(self) -> None:
        layout = ParameterLayout.from_arrays(stock(model()))
        whole = np.arange(2 * layout.size, dtype=np.float32)
        part = whole[10 : 10 + layout.size]
        np.testing.assert_array_equal(layout.flatten(layout.record(part)), part)

    def test_neighbours_by_chance_are_not_joined(self) -> None:
        # Same block, but in the wrong order, with a gap, or overlapping: each must be gathered.
        block = np.arange(10, dtype=np.float32)
        layout = ParameterLayout.from_arrays(stock({"a": np.zeros(3, "f4"), "b": np.zeros(3, "f4")}))
        for a, b in ((slice(3, 6), slice(0, 3)), (slice(0, 3), slice(4, 7)), (slice(0, 3), slice(1, 4))):
            record = ours({"a": block[a], "b": block[b]})
            vector = layout.flatten(record)
            np.testing.assert_array_equal(vector, np.concatenate([block[a], block[b]]))
            assert not np.shares_memory(vector, block)

    def test_another_owner_is_not_joined(self) -> None:
        layout = ParameterLayout.from_arrays(stock({"a": np.zeros(3, "f4"), "b": np.zeros(3, "f4")}))
        record = ours({"a": np.ones(3, "f4"), "b": np.full(3, 2, "f4")})
        np.testing.assert_array_equal(layout.flatten(record), [1, 1, 1, 2, 2, 2])

    def test_a_changed_record_is_not_read_from_the_old_vector(self) -> None:
        layout = ParameterLayout.from_arrays(stock(model()))
        record = layout.record(np.zeros(layout.size, np.float32))
        record["conv.bias"] = as_array(np.ones(4, np.float32))
        vector = layout.flatten(record)
        assert vector.sum() == 4

    def test_out_is_filled(self) -> None:
        layout = ParameterLayout.from_arrays(stock(model()))
        vector, out = np.arange(layout.size, dtype=np.float32), np.empty(layout.size, np.float32)
        assert layout.flatten(layout.record(vector), out=out) is out
        np.testing.assert_array_equal(out, vector)
        assert out.flags.writeable


class TestPrecisions:
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    def test_round_trip_is_exact(self, dtype: str) -> None:
        record = stock(model(dtype))
        layout = ParameterLayout.from_arrays(record)
        again = layout.record(layout.flatten(record))
        assert dict(again) == dict(record)

    def test_bf16_round_trip_is_exact(self) -> None:
        record = with_bf16(model())
        layout = ParameterLayout.from_arrays(record)
        assert {t.dtype for t in layout.tensors} == {"bfloat16"}
        assert layout.dtype == np.float32
        again = layout.record(layout.flatten(record))
        assert dict(again) == dict(record)

    def test_bf16_model_with_bf16_batch_norm(self) -> None:
        # `model.bfloat16()` turns running statistics to bfloat16 too.
        statistics = {"bn.running_mean": np.array([0.5, 3.0], np.float32)}
        record = with_bf16(model() | statistics)
        record["bn.num_batches_tracked"] = Array(np.array(3))
        layout = ParameterLayout.from_arrays(record)
        buffers = layout.buffers_of(record)
        np.testing.assert_array_equal(buffers["bn.running_mean"], [0.5, 3.0])
        again = layout.record(layout.flatten(record), buffers)
        assert {name: again[name] for name in record} == dict(record)

    def test_mixed_precisions(self) -> None:
        record = stock({"half": np.array([1.5], np.float16), "double": np.array([1e-300])})
        record["brain"] = as_bf16_array(np.array([2.5], np.float32))
        layout = ParameterLayout.from_arrays(record)
        np.testing.assert_array_equal(layout.flatten(record), [1.5, 1e-300, 2.5])
        again = layout.record(layout.flatten(record))
        assert {name: again[name] for name in record} == dict(record)

    @given(
        st.lists(
            hnp.arrays(
                st.sampled_from([np.float16, np.float32, np.float64, np.int32, np.bool_]),
                hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
                elements={"allow_nan": False},
            ),
            min_size=1,
            max_size=6,
        )
    )
    def test_round_trip(self, arrays: list[np.ndarray]) -> None:
        record = stock({f"t{i}": value for i, value in enumerate(arrays)} | {"w": np.ones(1, np.float32)})
        layout = ParameterLayout.from_arrays(record)
        again = layout.record(layout.flatten(record), layout.buffers_of(record))
        assert {name: again[name] for name in record} == dict(record)
        twice = layout.flatten(again)
        np.testing.assert_array_equal(twice, layout.flatten(record))


GOOD = model()
WRONG = {
    "missing": {k: v for k, v in GOOD.items() if k != "scale"},
    "unknown": GOOD | {"extra": np.zeros(1, np.float32)},
    "renamed": {("other" if k == "scale" else k): v for k, v in GOOD.items()},
    "transposed": GOOD | {"fc.weight": np.zeros((4, 2), np.float32)},
    "flattened": GOOD | {"fc.weight": np.zeros(8, np.float32)},
    "broadcastable": GOOD | {"conv.bias": np.zeros((1,), np.float32)},
    "scalar for vector": GOOD | {"conv.bias": np.zeros((), np.float32)},
    "double": GOOD | {"scale": np.zeros((), np.float64)},
    "half": GOOD | {"scale": np.zeros((), np.float16)},
    "integer": GOOD | {"scale": np.zeros((), np.int32)},
    "empty": {},
}


class TestRefusals:
    @pytest.mark.parametrize("name", WRONG)
    def test_wrong_names_shapes_dtypes(self, name: str) -> None:
        layout = ParameterLayout.from_arrays(stock(GOOD))
        with pytest.raises(LayoutError):
            layout.flatten(stock(WRONG[name]))

    def test_the_message_names_tensor_and_both_shapes(self) -> None:
        layout = ParameterLayout.from_arrays(stock(GOOD))
        with pytest.raises(LayoutError, match=r"'fc.weight' has shape \(4, 2\), the model needs \(2, 4\)"):
            layout.flatten(stock(WRONG["transposed"]))

    def test_declared_dtype_is_not_believed(self) -> None:
        layout = ParameterLayout.from_arrays(stock({"w": np.zeros(3, np.float32)}))
        data = Array(np.zeros(3, np.int32)).data
        with pytest.raises(LayoutError, match="its data is int32"):
            layout.flatten(ArrayRecord({"w": Array("float32", (3,), "numpy.ndarray", data)}))

    def test_bf16_under_another_name(self) -> None:
        layout = ParameterLayout.from_arrays(with_bf16({"w": np.zeros(3, np.float32)}))
        with pytest.raises(LayoutError, match="dtype float32"):
            layout.flatten(stock({"w": np.zeros(3, np.float32)}))
        lie = Array("bfloat16", (3,), "numpy.ndarray", Array(np.zeros(3, np.float16)).data)
        with pytest.raises(LayoutError, match="its data is float16"):
            layout.flatten(ArrayRecord({"w": lie}))

    def test_buffers_are_asked_for_only_where_they_belong(self) -> None:
        layout = ParameterLayout.from_arrays(stock(GOOD | BUFFERS))
        with pytest.raises(LayoutError, match="missing"):
            layout.flatten(stock(GOOD))
        assert layout.flatten(stock(GOOD), with_buffers=False).size == layout.size
        with pytest.raises(LayoutError, match="unknown"):
            layout.flatten(stock(GOOD | BUFFERS), with_buffers=False)

    @pytest.mark.parametrize("shape", [(36,), (38,), (37, 1), ()])
    def test_vectors_of_the_wrong_shape(self, shape: tuple[int, ...]) -> None:
        layout = ParameterLayout.from_arrays(stock(GOOD))
        with pytest.raises(LayoutError, match="the layout needs"):
            layout.record(np.zeros(shape, np.float32))


class TestTrimmed:
    def test_only_the_numbers_before_the_last_zeros_travel(self) -> None:
        layout = ParameterLayout.from_arrays(ours(model()))
        vector = np.zeros(layout.size, np.float32)
        pieces = {t.name: vector[t.offset : t.offset + t.size] for t in layout.tensors}
        pieces["conv.weight"][[0, 4]] = 1.5, -0.0  # A negative zero is a number: bits count.
        pieces["fc.weight"][:] = 2.0
        record = layout.record(vector, trimmed=True)
        sizes = {name: pack({name: array})[0].size for name, array in record.items()}
        assert sizes == {"conv.weight": 20, "conv.bias": 0, "scale": 0, "none": 0, "fc.weight": 32}
        assert layout.flatten(record, with_buffers=False).tobytes() == vector.tobytes()

    @given(hnp.arrays(hnp.floating_dtypes(sizes=(16, 32, 64), endianness="<"), hnp.array_shapes(min_side=0)))
    def test_every_array_comes_back_to_the_bit(self, content: np.ndarray) -> None:
        layout = ParameterLayout.from_arrays({"w": as_array(content)})
        back = layout.flatten({"w": as_leading_array(content)})
        assert back.tobytes() == content.astype(layout.dtype).tobytes()

    @pytest.mark.parametrize(
        ("dtype", "shape", "data", "words"),
        [
            ("float32", (3,), b"\0" * 16, "at most as many"),
            ("float32", (3,), b"\0" * 5, "whole numbers"),
            ("float32", (1 << 50,), b"", "the model needs"),
            ("int32", (3,), b"", "the model needs float32"),
        ],
    )
    def test_bytes_that_do_not_fit_are_refused(
        self, dtype: str, shape: tuple[int, ...], data: bytes, words: str
    ) -> None:
        layout = ParameterLayout.from_arrays({"w": as_array(np.zeros(3, np.float32))})
        with pytest.raises(LayoutError, match=words):
            layout.flatten({"w": Array(dtype, shape, LEADING_STYPE, data)})
