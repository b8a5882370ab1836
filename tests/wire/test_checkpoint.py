"""Checkpoints: whole or not at all, and no damaged byte is ever trained on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from turnout.wire import CheckpointError, checkpoint, load_checkpoint, save_checkpoint

DTYPES = [
    np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8,
    np.uint64, np.uint32, np.uint16, np.uint8, np.bool_,
]  # fmt: skip
TREE: dict[str, Any] = {
    "round": 12,
    "strategy": {
        "x": np.linspace(-1, 1, 50, dtype=np.float32),
        "names": ["a", None, True, 1.5, "snowman \u2603 \x00 \ud800"],
        "slots": {str(i): np.full(3, i, np.float64) for i in range(3)},
        "count": np.array(7, np.int64),
        "empty": np.empty((0, 4), np.float32),
        "nothing": {},
        "none": [],
    },
    "infinite": [float("inf"), float("-inf")],
}


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, np.ndarray):
        assert isinstance(b, np.ndarray)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert set(a) == set(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert isinstance(b, list)
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert type(a) is type(b)
        assert a == b or (a != a and b != b)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "round-12.safetensors"


keys = st.text(st.sampled_from("ab/~.0\u00e9_ "), min_size=0, max_size=4)
arrays = hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
values = st.none() | st.booleans() | st.integers() | st.floats() | keys
trees = st.dictionaries(
    keys,
    st.recursive(
        values | arrays,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


class TestRoundTrip:
    def test_tree(self, path: Path) -> None:
        save_checkpoint(path, TREE)
        assert_same(TREE, load_checkpoint(path))

    @given(trees)
    @settings(max_examples=60)
    def test_any_tree(self, tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
        path = tmp_path_factory.getbasetemp() / "any.safetensors"
        save_checkpoint(path, tree)
        assert_same(tree, load_checkpoint(path))

    def test_names_with_separators_do_not_collide(self, path: Path) -> None:
        tree = {"a": {"b": np.zeros(1)}, "a/b": np.ones(1), "a~1b": np.full(1, 2.0), "l": [np.full(1, 3.0)]}
        tree["l/0"] = np.full(1, 4.0)
        save_checkpoint(path, tree)
        assert_same(tree, load_checkpoint(path))

    @pytest.mark.parametrize("leaf", [np.float32(1.5), np.int64(-3), np.bool_(True), np.str_("x")])
    def test_numpy_scalars_become_plain(self, path: Path, leaf: Any) -> None:
        save_checkpoint(path, {"leaf": leaf})
        assert_same({"leaf": leaf.item()}, load_checkpoint(path))

    def test_strided_fortran_and_read_only_arrays(self, path: Path) -> None:
        frozen = np.arange(3)
        frozen.flags.writeable = False
        tree = {"s": np.arange(10)[::3], "f": np.asfortranarray(np.arange(6).reshape(2, 3)), "r": frozen}
        save_checkpoint(path, tree)
        loaded = load_checkpoint(path)
        for key, value in tree.items():
            np.testing.assert_array_equal(loaded[key], value)

    def test_loaded_arrays_are_aligned_and_changing_them_leaves_the_file(self, path: Path) -> None:
        tree = {"a": np.ones(3, np.uint8), "b": np.ones(3, np.float64), "c": np.ones(3, np.float16)}
        save_checkpoint(path, tree)
        loaded = load_checkpoint(path)
        for array in loaded.values():
            assert array.flags.aligned
            array += 1
        assert_same(tree, load_checkpoint(path))

    def test_overwriting_keeps_what_was_loaded(self, path: Path) -> None:
        save_checkpoint(path, {"x": np.zeros(5000)})
        loaded = load_checkpoint(path)
        save_checkpoint(path, {"x": np.ones(5000)})
        assert loaded["x"].sum() == 0
        assert load_checkpoint(path)["x"].sum() == 5000

    def test_the_safetensors_library_opens_it(self, path: Path) -> None:
        save_checkpoint(path, TREE)
        tensors = load_file(path)
        np.testing.assert_array_equal(tensors["/strategy/x"], TREE["strategy"]["x"])
        assert tensors["/strategy/empty"].shape == (0, 4)
        assert len(tensors) == 6

    def test_the_same_tree_gives_the_same_bytes(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            save_checkpoint(tmp_path / name, TREE)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
    def test_many_arrays_take_one_memory_map(self, path: Path) -> None:
        # A process may have some 65 000, fewer than a federation has clients.
        save_checkpoint(path, {"rows": {str(i): np.array([i], np.int32) for i in range(500)}})
        loaded = load_checkpoint(path)
        assert loaded["rows"]["499"] == 499
        assert Path("/proc/self/maps").read_text().count(path.name) == 1


class TestRefusedLeaves:
    @pytest.mark.parametrize(
        ("leaf", "named"),
        [
            (np.zeros(2, np.complex64), "complex64"),
            (np.zeros(2, ">f4"), ">f4"),
            (np.array(["a"]), "<U1"),
            (np.array([None]), "object"),
            (b"bytes", "bytes"),
            ({1, 2}, "set"),
            (object(), "object"),
            ({1: 2}, "keys must be text"),
        ],
    )
    def test_named_and_nothing_written(self, tmp_path: Path, leaf: Any, named: str) -> None:
        with pytest.raises(CheckpointError, match=named) as caught:
            save_checkpoint(tmp_path / "c", {"deep": {"leaf": leaf}})
        assert "/deep/leaf" in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_a_state_too_wide_to_be_read_back_is_not_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(checkpoint, "_MAX_HEADER_BYTES", 1000)
        with pytest.raises(CheckpointError, match="fewer separate arrays"):
            save_checkpoint(tmp_path / "c", {str(i): i for i in range(200)})
        assert list(tmp_path.iterdir()) == []


class TestDamage:
    @pytest.fixture
    def good(self, path: Path) -> bytes:
        tree = {"round": 1, "x": np.arange(9, dtype=np.float32), "e": np.empty((0, 3)), "i": [np.arange(3)]}
        save_checkpoint(path, tree)
        return path.read_bytes()

    def refused(self, path: Path, raw: bytes) -> None:
        path.write_bytes(raw)
        with pytest.raises(CheckpointError, match=r"round-12\.safetensors"):
            load_checkpoint(path)

    def test_any_flipped_byte(self, path: Path, good: bytes) -> None:
        for i in range(len(good)):
            flipped = good[i] ^ (0x01, 0x20, 0x0B, 0x80)[i % 4]
            self.refused(path, good[:i] + bytes([flipped]) + good[i + 1 :])

    def test_another_dtype_of_the_same_size(self, path: Path, good: bytes) -> None:
        # Every array would still fit, with other numbers in it.
        assert good.count(b'"F32"') == 1
        self.refused(path, good.replace(b'"F32"', b'"I32"'))

    def test_cut_off_anywhere(self, path: Path, good: bytes) -> None:
        for length in [*range(60), *range(60, len(good), 13), len(good) - 1]:
            self.refused(path, good[:length])

    @pytest.mark.parametrize("extra", [b"\0", b"\0" * 4096])
    def test_something_appended(self, path: Path, good: bytes, extra: bytes) -> None:
        self.refused(path, good + extra)

    def test_not_there_or_a_directory(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="No such file"):
            load_checkpoint(tmp_path / "missing")
        with pytest.raises(CheckpointError, match="directory"):
            load_checkpoint(tmp_path)

    def test_of_another_program(self, path: Path) -> None:
        from safetensors.numpy import save_file

        save_file({"w": np.zeros(3)}, path)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def sealed(header: bytes, body: bytes = b"") -> bytes:
    """A file with a valid checksum around this header, which follows the opening."""
    closing = header[len(checkpoint._OPENING) + 64 :]
    digest = checkpoint._digest(closing, [np.frombuffer(body, np.uint8)])
    raw = checkpoint._OPENING + digest.encode() + closing
    return len(raw).to_bytes(8, "little") + raw + body


def header_with(entry: Any, tree: Any = None) -> bytes:
    metadata = {
        "sha256": "0" * 64,
        "format": "turnout-checkpoint-1",
        "tree": json.dumps(tree or {"map": {"x": {"array": "/x"}}}),
    }
    return json.dumps({"__metadata__": metadata, "/x": entry}).encode()


FOUR = b"\0" * 4
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def entry(shape: Any, begin: int = 0, end: int = 4, dtype: str = "F32") -> bytes:
    return header_with({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


BOMBS = {
    "length of 2**64": b"\xff" * 8 + b"{}",
    "length beyond the file": (100).to_bytes(8, "little") + b"{}",
    "shorter than its length": b"\x01\0\0",
    "deep nesting": sealed(header_with(0)[:-2] + b"[" * 200_000),
    "deep tree": sealed(header_with(EMPTY, json.loads("[" * 900 + "]" * 900))),
    "huge shape": sealed(entry([2**62, 2**62]), FOUR),
    "negative shape": sealed(entry([-1, -1]), FOUR),
    "offset before the file": sealed(entry([1], -4, 0), FOUR),
    "offset beyond the file": sealed(entry([9], 0, 36), FOUR),
    "hole": sealed(entry([1], 4, 8), FOUR * 2),
    "bytes of no array": sealed(entry([1]), FOUR * 2),
    "unknown dtype": sealed(entry([2], dtype="BF16"), FOUR),
    "shape is text": sealed(entry("ab"), FOUR),
    "entry is a list": sealed(header_with([1, 2])),
    "entry is a number": sealed(header_with(3)),
    "tree names no array": sealed(header_with(EMPTY, {"array": "/y"})),
    "tree is a list": sealed(header_with(EMPTY, [1])),
    "map is a list": sealed(header_with(EMPTY, {"map": [1]})),
    "other format": sealed(header_with(EMPTY).replace(b"checkpoint-1", b"checkpoint-9")),
}


def test_the_bombs_differ_from_a_good_file_only_in_what_they_say(path: Path) -> None:
    path.write_bytes(sealed(entry([1]), FOUR))
    np.testing.assert_array_equal(load_checkpoint(path)["x"], [0.0])


@pytest.mark.parametrize("name", BOMBS)
def test_header_bombs_are_refused(path: Path, name: str) -> None:
    path.write_bytes(BOMBS[name])
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


FAILING_WRITE = """
import os, resource, signal, sys
import numpy as np
from turnout.wire import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save_checkpoint(sys.argv[1], {"x": np.zeros(100_000)})
except OSError as error:
    print(type(error).__name__)
"""


class TestWholeOrNotAtAll:
    def test_a_full_disk_leaves_the_old_file(self, path: Path) -> None:
        save_checkpoint(path, {"x": np.ones(3)})
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        done = subprocess.run(
            [sys.executable, "-c", FAILING_WRITE, str(path)], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == "OSError", done.stderr
        assert load_checkpoint(path)["x"].sum() == 3
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    @pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()])
    def test_a_failing_rename_leaves_the_old_file(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        save_checkpoint(path, {"x": np.ones(3)})

        def refuse(*_: object) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", refuse)
            with pytest.raises(type(error)):
                save_checkpoint(path, {"x": np.zeros(3)})
        assert load_checkpoint(path)["x"].sum() == 3
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    def test_synced_before_it_appears(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        events: list[str] = []
        fsync, replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd))[1])
        monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b))[1])
        save_checkpoint(path, {"x": np.ones(3)})
        assert events == ["fsync", "replace", "fsync"]


def test_one_piece_of_memory_is_written_once(path: Path) -> None:
    model = np.arange(1000, dtype=np.float32)
    clients = {str(i): [["theta", model.view()]] for i in range(10)}
    parts = {"x": model, "clients": clients, "front": model[:500], "matrix": model.reshape(10, 100)}
    save_checkpoint(path, parts)
    assert path.stat().st_size < 4 * 4000
    assert_same(load_checkpoint(path), parts)
