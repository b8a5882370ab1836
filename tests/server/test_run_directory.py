from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from turnout.server import RunDirectory, RunDirectoryError, run_directory


def make(path: Path) -> RunDirectory:
    return RunDirectory.create(path, experiment={"run": {"rounds": 3}}, environment={"python": "3.11"})


def test_a_directory_is_made_complete(tmp_path: Path) -> None:
    directory = make(tmp_path / "runs" / "r1")
    assert tomllib.loads(directory.experiment_file.read_text()) == {"run": {"rounds": 3}}
    assert sorted(p.name for p in directory.path.iterdir()) == [
        "checkpoints",
        "environment.json",
        "experiment.toml",
        "metrics.jsonl",
        "model",
        "plots",
    ]
    with pytest.raises(RunDirectoryError, match="exists already"):
        make(directory.path)


def test_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run_directory.write_atomically

    def full_disk(path: Path, content: str | bytes) -> None:
        if path.name == "metrics.jsonl":
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(run_directory, "write_atomically", full_disk)
    with pytest.raises(OSError, match="No space"):
        make(tmp_path / "r1")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"experiment\.toml is missing"):
        RunDirectory(tmp_path)


def test_old_checkpoints_and_torn_writes_go(tmp_path: Path) -> None:
    directory = make(tmp_path / "r1")
    for number in (1, 2, 3):
        directory.checkpoint(number).touch()
    torn = directory.checkpoint(3).with_name(".round-000003.safetensors.x.partial")
    torn.touch()
    note = directory.checkpoint(1).with_name("note.txt")
    note.touch()
    directory.keep_checkpoints([2, 3])
    left = sorted(p.name for p in (directory.path / "checkpoints").iterdir())
    assert left == ["note.txt", "round-000002.safetensors", "round-000003.safetensors"]


def test_a_directory_belongs_to_one_process(tmp_path: Path) -> None:
    directory = make(tmp_path / "r1")
    assert not directory.in_use()
    directory.acquire()
    directory.acquire()  # Twice by its owner does no harm.
    assert directory.in_use()
    assert RunDirectory(directory.path).in_use()
    with pytest.raises(RunDirectoryError, match="in use by another process"):
        RunDirectory(directory.path).acquire()
    directory.release()
    assert not directory.in_use()


def test_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    directory = make(tmp_path / "r1")
    code = (
        "import sys, os; from turnout.server import RunDirectory; RunDirectory(sys.argv[1]).acquire(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(directory.path)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "held"
    assert directory.in_use()
    process.kill()
    process.communicate()
    assert not directory.in_use()
