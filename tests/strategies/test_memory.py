"""Per-client memory: three backends, one table of behaviours; and the running mean over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turnout.strategies import ClientMemory, HalfMemory, MappedMemory, RamMemory, open_memory
from turnout.strategies.memory_mean import REBASE_EVERY, MemoryMean
from turnout.wire import CheckpointError, ConfigError, load_checkpoint, save_checkpoint

KINDS: dict[str, Callable[[], ClientMemory]] = {"ram": RamMemory, "fp16": HalfMemory, "mmap": MappedMemory}
every_kind = pytest.mark.parametrize("kind", sorted(KINDS))
SIZE = 6


def vector(seed: int, dtype: type = np.float32, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(SIZE)).astype(dtype)


def assert_stored(kind: str, stored: object, expected: np.ndarray) -> None:
    assert isinstance(stored, np.ndarray)
    assert stored.dtype == expected.dtype
    if kind == "fp16":
        bound = np.maximum(np.abs(expected) * 2.0**-11, np.abs(expected).max() * 2.0**-25) * 1.001
        assert (np.abs(np.float64(stored) - expected) <= bound).all()
    else:
        assert stored.tobytes() == expected.tobytes()


@every_kind
class TestBackends:
    def test_nothing_at_first(self, kind: str) -> None:
        memory = KINDS[kind]()
        assert (len(memory), list(memory.keys()), memory.get(0), memory.nbytes) == (0, [], None, 0)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_put_get_overwrite(self, kind: str, dtype: type) -> None:
        memory = KINDS[kind]()
        for seed in (1, 2):
            expected = vector(seed, dtype)
            returned = memory.put(5, expected)
            assert_stored(kind, memory.get(5), expected)
            assert np.array_equal(returned, memory.get(5))
            assert len(memory) == 1
        assert memory.get(4) is None

    def test_what_was_put_may_change_afterwards(self, kind: str) -> None:
        # The intake's buffer is overwritten by the next reply.
        memory, lent = KINDS[kind](), vector(1)
        memory.put(0, lent)
        lent[:] = -9
        assert_stored(kind, memory.get(0), vector(1))

    def test_growth(self, kind: str) -> None:
        memory = KINDS[kind]()
        for key in range(70, 0, -3):
            memory.put(key, vector(key))
        assert list(memory.keys()) == sorted(range(70, 0, -3))
        for key in range(70, 0, -3):
            assert_stored(kind, memory.get(key), vector(key))
        itemsize = 2 if kind == "fp16" else 4
        assert memory.nbytes == len(memory) * SIZE * itemsize

    def test_state_round_trip_through_a_file(self, kind: str, tmp_path: Path) -> None:
        memory = KINDS[kind]()
        for key in (9, 2, 30):
            memory.put(key, vector(key))
        save_checkpoint(tmp_path / "m", {"memory": memory.state_dict()})
        other = KINDS[kind]()
        other.put(77, vector(77))  # What was there is replaced.
        other.load_state_dict(load_checkpoint(tmp_path / "m")["memory"])
        assert list(other.keys()) == [2, 9, 30]
        for key in (9, 2, 30):
            assert np.array_equal(other.get(key), memory.get(key))
        other.put(2, vector(0))
        other.put(31, vector(31))
        assert_stored(kind, other.get(31), vector(31))
        assert_stored(kind, other.get(9), vector(9))

    def test_empty_state_round_trip(self, kind: str, tmp_path: Path) -> None:
        save_checkpoint(tmp_path / "m", {"memory": KINDS[kind]().state_dict()})
        other = KINDS[kind]()
        other.load_state_dict(load_checkpoint(tmp_path / "m")["memory"])
        assert len(other) == 0

    @given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 99)), max_size=25))
    def test_like_a_dict(self, kind: str, puts: list[tuple[int, int]]) -> None:
        memory, model = KINDS[kind](), {}
        for key, seed in puts:
            memory.put(key, vector(seed))
            model[key] = seed
        assert list(memory.keys()) == sorted(model)
        for key, seed in model.items():
            assert_stored(kind, memory.get(key), vector(seed))

    @pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-30, 1e15])
    def test_extreme_scales(self, kind: str, scale: float) -> None:
        memory, expected = KINDS[kind](), vector(3, scale=scale)
        memory.put(0, expected)
        stored = memory.get(0)
        assert np.isfinite(stored).all()
        assert np.abs(stored - expected).max() <= np.abs(expected).max() * 2.0**-11


class TestKinds:
    def test_open_by_name(self, tmp_path: Path) -> None:
        for kind, made in KINDS.items():
            assert type(open_memory(kind)) is made
        assert isinstance(open_memory(f"mmap:{tmp_path}"), MappedMemory)
        assert list(tmp_path.iterdir()) == []  # The file has no name that could be left behind.

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("rem", "unknown memory 'rem'. Did you mean 'ram'"),
            ("mmapped", "Did you mean 'mmap'"),
            ("ram:/data", "takes no directory"),
            ("mmap:/no/such/place", "'/no/such/place' is not a directory"),
            (None, "unknown memory 'None'"),
            (16, "unknown memory '16'"),
        ],
    )
    def test_bad_names(self, kind: object, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            open_memory(kind)  # type: ignore[arg-type]

    def test_ram_keeps_torch_tensors(self) -> None:
        memory, tensor = RamMemory(), torch.arange(3.0)
        memory.put(0, tensor)
        tensor += 1
        assert isinstance(memory.get(0), torch.Tensor)
        assert memory.get(0).tolist() == [0, 1, 2]
        assert memory.nbytes == 12

    def test_a_torn_mmap_state_is_refused(self) -> None:
        with pytest.raises(CheckpointError, match="2 rows for 3 clients"):
            MappedMemory().load_state_dict({"keys": np.arange(3), "rows": np.zeros((2, 4))})


@every_kind
class TestMemoryMean:
    def test_total_is_the_weighted_sum_and_changes_at_commit_only(self, kind: str) -> None:
        mean = MemoryMean(np.zeros(SIZE, np.float32), kind)
        rng = np.random.default_rng(0)
        expected = np.zeros(SIZE)
        for _ in range(2 * REBASE_EVERY + 3):
            mean.begin_round()
            for client in rng.choice(9, rng.integers(0, 4), replace=False).tolist():
                mean.store(client, vector(int(rng.integers(1000))), float(rng.integers(1, 5)))
            np.testing.assert_allclose(mean.total, expected, rtol=0, atol=1e-4)
            before = mean.total.copy()
            assert np.array_equal(mean.total, before)
            mean.commit()
            stored = [(mean.get(c), mean.weight(c)) for c in mean.memory.keys()]  # noqa: SIM118 - not a dict
            expected = sum((np.float64(v) * w for v, w in stored), np.zeros(SIZE))
            np.testing.assert_allclose(mean.total, expected, rtol=0, atol=2e-5)
            np.testing.assert_allclose(mean.recomputed(), expected, rtol=0, atol=1e-6)
        assert len(mean) == 9

    def test_rebase_removes_the_drift(self, kind: str) -> None:
        mean = MemoryMean(np.zeros(SIZE, np.float32), kind)
        mean.begin_round()
        mean.store(0, vector(1))
        mean.commit()
        mean.total = mean.total + 1e-3  # As if it had drifted.
        for stores in range(2, REBASE_EVERY + 1):
            assert not np.array_equal(mean.total, mean.recomputed()), stores
            mean.begin_round()
            mean.store(0, vector(stores))
            mean.commit()
        assert np.array_equal(mean.total, mean.recomputed())

    def test_state_round_trip(self, kind: str, tmp_path: Path) -> None:
        mean = MemoryMean(np.zeros(SIZE, np.float32), kind)
        mean.begin_round()
        for client in (7, 3):
            mean.store(client, vector(client), client / 3)
        mean.commit()
        save_checkpoint(tmp_path / "m", mean.state_dict())
        other = MemoryMean(np.zeros(SIZE, np.float32), kind)
        other.load_state_dict(load_checkpoint(tmp_path / "m"))
        for both in (mean, other):
            both.begin_round()
            both.store(7, vector(8), 2.0)
            both.commit()
        assert other.total.tobytes() == mean.total.tobytes()
        assert other.recomputed().tobytes() == mean.recomputed().tobytes()

    def test_a_checkpoint_of_another_kind_is_refused(self, kind: str) -> None:
        other = next(k for k in KINDS if k != kind)
        with pytest.raises(CheckpointError, match=f"kind '{kind}', this run has memory='{other}'"):
            MemoryMean(np.zeros(2), other).load_state_dict(MemoryMean(np.zeros(2), kind).state_dict())

    def test_arrival_order(self, kind: str) -> None:
        totals = set()
        for order in ([0, 1, 2], [2, 0, 1]):
            mean = MemoryMean(np.zeros(SIZE, np.float32), kind)
            for server_round in (1, 2):
                mean.begin_round()
                for client in order:
                    mean.store(client, vector(10 * server_round + client, scale=10.0**client), 1 / 3)
                mean.commit()
            totals.add(mean.total.tobytes())
        assert len(totals) == 1
