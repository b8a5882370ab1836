"""Rows in a file: changed a few at a time, and never under a checkpoint that may be resumed from."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.wire import CheckpointError, load_checkpoint, save_checkpoint
from turnout.wire.row_file import RowFile, RowReference

SIZE = 40


def row(seed: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def content(rows: RowReference) -> dict[int, bytes]:
    return {key: value.tobytes() for key, value in rows}


def loaded(path: Path, *, owned: bool = False) -> RowReference:
    rows = load_checkpoint(path, owned=owned)["rows"]
    assert isinstance(rows, RowReference)
    return rows


def save(file: RowFile, path: Path) -> RowReference:
    rows = file.reference()
    save_checkpoint(path, {"rows": rows})
    return rows


class TestRows:
    def test_it_grows_by_one_slot_when_a_key_first_appears(self, tmp_path: Path) -> None:
        file = RowFile.create(tmp_path / "a.rows")
        for count, key in enumerate([90_000, 3, 70_000], start=1):
            file.put(key, row(key))
            assert (len(file), file.slots, file.nbytes) == (count, count, 4 * SIZE * count)
        assert file.path.stat().st_size < 4 * (4 * SIZE + 200)  # Of 90,000 possible ones.
        assert list(file.keys()) == [3, 70_000, 90_000]
        assert file.get(4) is None
        assert file.get(3).tobytes() == row(3).tobytes()  # type: ignore[union-attr]

    def test_a_row_is_written_over_while_no_checkpoint_has_it(self, tmp_path: Path) -> None:
        file = RowFile.create(tmp_path / "a.rows")
        for seed in range(20):
            file.put(5, row(seed))
        assert file.slots == 1

    def test_large_rows_begin_on_a_page(self, tmp_path: Path) -> None:
        file = RowFile.create(tmp_path / "a.rows")
        for key in range(3):
            file.put(key, row(key, 50_000))
        assert file.path.stat().st_size % (3 * 4096) == 0
        assert file.get(1).tobytes() == row(1, 50_000).tobytes()  # type: ignore[union-attr]
        file.expect(iter([0, 2, 77]))

    @pytest.mark.parametrize("other", [row(1, SIZE + 1), row(1).astype(np.float64)])
    def test_another_size_or_precision_is_refused(self, tmp_path: Path, other: np.ndarray) -> None:
        file = RowFile.create(tmp_path / "a.rows")
        file.put(0, row(0))
        with pytest.raises(
            ValueError, match=r"row 1 is .*, the file's are RowFormat\(dtype='float32', size=40\)"
        ):
            file.put(1, other)

    def test_a_full_disk_names_file_and_size(self) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("needs /dev/full")
        file = RowFile(Path("/dev/full"), os.open("/dev/full", os.O_RDWR))
        with pytest.raises(OSError, match=r"No space left.*256 bytes were to be written"):
            file.put(0, row(0))
        assert len(file) == 0

    def test_handles_are_closed_with_the_object(self, tmp_path: Path) -> None:
        file = RowFile.create(tmp_path / "a.rows")
        handle = file._handle
        os.fstat(handle)
        del file
        gc.collect()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(handle)


class TestCheckpoints:
    def test_both_kept_checkpoints_stay_as_they_were(self, tmp_path: Path) -> None:
        """Slots come back once only forgotten checkpoints refer to them, so the file stops growing."""
        file, expected = RowFile.create(tmp_path / "a.rows"), {}
        kept: list[tuple[Path, RowReference, dict[int, bytes]]] = []
        sizes = []
        for number in range(1, 13):
            for key in range(number, number + 3):
                key %= 5
                file.put(key, row(100 * number + key))
                expected[key] = row(100 * number + key).tobytes()
            path = tmp_path / f"{number}.safetensors"
            kept = [*kept, (path, save(file, path), dict(expected))][-2:]
            kept[0][1].forget_older()
            for saved, _, then in kept:
                assert content(loaded(saved)) == then
            sizes.append(file.slots)
        assert sizes[-1] == sizes[4] <= 5 + 3 * 3  # All rows, and those replaced since the older checkpoint.

    @given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from("ppprcf")), max_size=40))
    @settings(max_examples=40, deadline=None)
    def test_no_checkpoint_changes_whatever_is_done(
        self, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, str]]
    ) -> None:
        folder = tmp_path_factory.mktemp("rows")
        file, expected = RowFile.create(folder / "a.rows"), {}
        kept: list[tuple[RowReference, dict[int, bytes]]] = []
        for number, (key, step) in enumerate(steps):
            if step == "p":
                file.put(key, row(number))
                expected[key] = row(number).tobytes()
            elif step == "r":
                file.remove(key)
                expected.pop(key, None)
            elif step == "c":
                kept.append((file.reference(), dict(expected)))
            elif len(kept) > 2:
                kept = kept[-2:]
                kept[0][0].forget_older()
            for rows, then in kept:
                assert content(rows) == then
        assert len(file) == len(expected)
        assert {key: file.get(key).tobytes() for key in file.keys()} == expected  # type: ignore[union-attr]  # noqa: SIM118

    def test_reopened_it_goes_on_without_touching_older_checkpoints(self, tmp_path: Path) -> None:
        file = RowFile.create(tmp_path / "a.rows")
        for number in (1, 2):
            for key in range(3):
                file.put(key, row(10 * number + key))
            save(file, tmp_path / str(number))
        file.put(0, row(99))  # Of a round that was never committed.
        del file
        then = {number: content(loaded(tmp_path / str(number))) for number in (1, 2)}
        rows = loaded(tmp_path / "2", owned=True)
        again = RowFile.reopen(rows)
        assert {key: again.get(key).tobytes() for key in again.keys()} == then[2]  # type: ignore[union-attr]  # noqa: SIM118
        before = again.slots
        for key in range(3):
            again.put(key, row(30 + key))
        save(again, tmp_path / "3")
        assert {number: content(loaded(tmp_path / str(number))) for number in (1, 2)} == then
        rows.forget_older()  # Checkpoint 1 will not be resumed from, nor what was never committed.
        size = again.slots
        for key in range(3):
            again.put(key, row(40 + key))
        assert again.slots == size > before
        assert content(loaded(tmp_path / "2")) == then[2]
        assert content(loaded(tmp_path / "3")) == {key: row(30 + key).tobytes() for key in range(3)}

    def test_reopened_again_and_again_it_does_not_grow(self, tmp_path: Path) -> None:
        """What no kept checkpoint refers to is used at once, if it is known which they are."""
        file, sizes = RowFile.create(tmp_path / "a.rows"), []
        for number in range(8):
            for key in range(3):
                file.put(key, row(10 * number + key))
            save(file, tmp_path / str(number))
            file.put(number % 3, row(99))  # Of a round that was never committed.
            sizes.append(file.slots)
            rows = loaded(tmp_path / str(number), owned=True)
            rows.older = [loaded(tmp_path / str(number - 1))] if number else []
            file = RowFile.reopen(rows)
            for kept in range(max(0, number - 1), number + 1):
                expected = {key: row(10 * kept + key).tobytes() for key in range(3)}
                assert content(loaded(tmp_path / str(kept))) == expected
        assert sizes[-1] == sizes[2] <= 3 * 3 + 1

    def test_a_run_can_be_moved_with_its_rows(self, tmp_path: Path) -> None:
        (tmp_path / "old").mkdir()
        file = RowFile.create(tmp_path / "old" / "a.rows")
        file.put(4, row(4))
        save(file, tmp_path / "old" / "c")
        (tmp_path / "old").rename(tmp_path / "new")
        assert content(loaded(tmp_path / "new" / "c")) == {4: row(4).tobytes()}

    def test_rows_elsewhere_are_found_by_their_whole_path(self, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        file = RowFile.create(tmp_path / "disk" / "a.rows")
        file.put(4, row(4))
        save(file, tmp_path / "c")
        assert content(loaded(tmp_path / "c")) == {4: row(4).tobytes()}

    def test_nothing_stored_yet(self, tmp_path: Path) -> None:
        save(RowFile.create(tmp_path / "a.rows"), tmp_path / "c")
        again = RowFile.reopen(loaded(tmp_path / "c", owned=True))
        assert (len(again), again.get(0), again.nbytes) == (0, None, 0)
        again.put(0, row(0))

    def test_every_damaged_byte_of_a_row_is_found(self, tmp_path: Path) -> None:
        file = RowFile.create(tmp_path / "a.rows")
        file.put(0, row(0))
        file.put(1, row(1))
        save(file, tmp_path / "c")
        good = file.path.read_bytes()
        # Key, checkpoint number, checksum, row; what lies between belongs to nothing.
        for at in [*range(20), *range(64, 64 + 4 * SIZE)]:
            damaged = bytearray(good)
            damaged[at] ^= 0x40
            file.path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="the row of client 0 is damaged, or not its own"):
                load_checkpoint(tmp_path / "c")

    @pytest.mark.parametrize("left", [0, 100, 300])
    def test_a_cut_or_missing_file_is_refused(self, tmp_path: Path, left: int) -> None:
        file = RowFile.create(tmp_path / "a.rows")
        file.put(0, row(0))
        file.put(1, row(1))
        save(file, tmp_path / "c")
        os.truncate(file.path, left)
        with pytest.raises(CheckpointError, match="the file is shorter than its checkpoint says"):
            load_checkpoint(tmp_path / "c")
        file.path.unlink()
        with pytest.raises(CheckpointError, match=r"a\.rows: No such file"):
            load_checkpoint(tmp_path / "c")

    def test_a_row_of_a_later_time_is_refused(self, tmp_path: Path) -> None:
        """If a slot were used again too early, its checkpoint would not be trained on."""
        file = RowFile.create(tmp_path / "a.rows")
        file.put(0, row(0))
        save(file, tmp_path / "c")
        file._fresh.add(0)  # As if the checkpoint did not count.
        file.put(0, row(1))
        with pytest.raises(CheckpointError, match="the row of client 0 is damaged, or not its own"):
            load_checkpoint(tmp_path / "c")

    @pytest.mark.parametrize(("name", "value"), [("dtype", "object"), ("size", -3), ("epoch", "x")])
    def test_crafted_references_are_refused(self, tmp_path: Path, name: str, value: object) -> None:
        document = {"file": "a", "epoch": 1, "dtype": "float32", "size": 4, "slots": {"count": 0}}
        RowReference.read(document, tmp_path, owned=False)
        with pytest.raises(CheckpointError, match="rows of the checkpoint are not readable"):
            RowReference.read({**document, name: value}, tmp_path, owned=False)
