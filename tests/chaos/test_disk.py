"""The disk is full, lies about a sync, or gives back another file than was written."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chaos_faults import sweep
from chaos_harness import FAIL, FAIL_ON, SYNC, WRITE, Server, half_files, twin, with_shim

from turnout.server.store import RunStore
from turnout.wire import CheckpointError, load_checkpoint, save_checkpoint

Judge = Callable[[Server, int, str], None]
Chaos = Callable[..., Any]


def _intact(server: Server, tmp_path: Path) -> Callable[[int], None]:
    """Return the check after each fault: the newest committed checkpoint is whole, nothing is half there."""

    def check(step: int) -> None:
        with RunStore(server.store, create=False) as store:
            run = store.runs(limit=1)[0]
            newest = max((row.round for row in store.rounds(run.id) if row.checkpoint), default=0)
        assert load_checkpoint(server.directory().checkpoint(newest))["round"] == newest, f"step {step}"
        assert half_files(tmp_path / "runs") == [], f"step {step}"

    return check


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize(
    ("kinds", "action", "number"),
    [(WRITE, FAIL_ON, errno.ENOSPC), (SYNC, FAIL, errno.EIO)],
    ids=["disk full from the step on", "one sync fails"],
)
def test_a_failing_disk_stops_the_run_and_it_goes_on(
    kinds: int, action: int, number: int, chaos: Chaos, judge: Judge, tmp_path: Path
) -> None:
    """A failed sync is not tried again and believed: the process ends, and the next one writes anew."""
    rounds = 60
    with chaos(rounds=rounds, forked=True, environment=with_shim(tmp_path / "runs")) as (server, _):
        server.start(hold_after=1)
        server.wait_for("committed")
        server.kill()
        figures = sweep(
            server,
            action=action,
            kinds=kinds,
            errno=number,
            repair=True,
            hold_after=1,
            check=_intact(server, tmp_path),
        )
        print(f"steps failed {figures.covered}/{figures.steps}, ends {dict(figures.ends)}")
        assert figures.covered == figures.steps > 5
        # SQLite ignores that the sync of a directory failed; every other step ends the process.
        assert figures.ends[1] >= figures.steps - 1
        for line in figures.errors:
            assert str(tmp_path / "runs") in line["failed"]
            assert "free" in line["failed"]
        server.start()
        judge(server, rounds, server.finish())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, list[str]]]:
    """A file system of 6 MB that only processes started with the prefix see; it lasts until the test ends."""
    folder = tmp_path / "runs"
    folder.mkdir()
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("a small disk of its own needs root, unshare and nsenter")
    script = f"mount -t tmpfs -o size=6m tmpfs {folder} && echo mounted && exec sleep 600"
    holder = subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    if holder.stdout.readline() != "mounted\n":
        holder.wait(10)
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder, ["nsenter", "-m", "-t", str(holder.pid)]
    holder.kill()
    holder.wait(10)


def test_a_full_disk_and_space_again(
    small_disk: tuple[Path, list[str]], chaos: Chaos, tmp_path: Path
) -> None:
    """A real file system of 6 MB, filled while the run goes on."""
    folder, prefix = small_disk
    rounds = 12

    def inside(*command: str) -> str:
        return subprocess.run([*prefix, *command], check=True, capture_output=True, text=True).stdout

    with chaos(rounds=rounds, prefix=prefix, size=100_000) as (server, _):
        server.start(hold_after=2)
        server.wait_for("committed")
        server.kill()
        # Leaves less than a checkpoint (0.8 MB).
        free = int(inside("df", "--output=avail", "-B1", str(folder)).split()[-1])
        inside("sh", "-c", f"head -c {free - 300_000} /dev/zero > {folder}/ballast")
        server.start()
        assert server.wait() == 1
        failed = server.wait_for("failed")
        print(failed["failed"])
        assert str(folder) in failed["failed"]
        assert "bytes" in failed["failed"]
        assert inside("find", str(folder), "-name", "*.partial") == ""
        inside("rm", f"{folder}/ballast")
        back = time.monotonic()
        server.start()
        assert server.wait_for("after")["after"] >= 1
        print(f"first work {server.wait_for('offered')['at'] - back:.2f} s after space was back")
        model = server.finish()
        assert model == twin(rounds, size=100_000)


def test_a_file_that_may_not_grow(chaos: Chaos, judge: Judge) -> None:
    """RLIMIT_FSIZE: what a full disk is without root. The checkpoint is 0.8 MB, the limit 0.5 MB."""
    limited = [sys.executable, "-c", "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, "
               "(500_000, 500_000)); os.execv(sys.argv[1], sys.argv[1:])"]  # fmt: skip
    with chaos(rounds=3, size=100_000) as (server, _):
        small = Server(server.store, prefix=limited, rounds=3, size=100_000, port=server.config["port"])
        small.start()
        assert small.wait() == 1
        failed = small.wait_for("failed")["failed"]
        assert "round-000001.safetensors" in failed
        assert "bytes were to be written" in failed
        assert half_files(server.store) == []
        assert server.status() == "failed"
        server.start()
        judge(server, 3, server.finish())


def test_every_damaged_byte_is_found(tmp_path: Path, rng: random.Random) -> None:
    """Every byte of the header, 1,000 bits of the body, cut files: all refused."""
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    vectors = np.random.default_rng(0).standard_normal((3, 2000)).astype(np.float32)
    save_checkpoint(good, {"round": 3, "run": "r", "strategy": {"x": vectors[0], "c": vectors[1:]}})
    raw = good.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    made = [(at, 1 << rng.randrange(8)) for at in range(header)]
    made += [(rng.randrange(header, len(raw)), 1 << rng.randrange(8)) for _ in range(1000)]
    found = 0
    for at, bit in made:
        damaged = bytearray(raw)
        damaged[at] ^= bit
        bad.write_bytes(damaged)
        found += _refused(bad)
    cuts = [rng.randrange(len(raw)) for _ in range(200)]
    for length in cuts:
        bad.write_bytes(raw[:length])
        found += _refused(bad)
    bad.write_bytes(raw + b"\0")
    found += _refused(bad)
    print(f"damaged files refused {found}/{len(made) + len(cuts) + 1}")
    assert found == len(made) + len(cuts) + 1
    assert not _refused(good)


def _refused(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except CheckpointError as error:
        return str(path) in str(error)
    return False


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "of another run", "of another round"])
def test_a_damaged_checkpoint_costs_one_round(
    damage: str, chaos: Chaos, judge: Judge, tmp_path: Path
) -> None:
    with chaos(rounds=6, forked=True, nodes=damage == "flipped") as (server, fleet):
        if not fleet.nodes:
            fleet.start("0-7")
        server.start(hold_after=3)
        server.wait_for("listening")
        while server.life.committed < 3:
            assert server.life.code is None
            time.sleep(0.005)
        server.kill()
        newest, before = server.directory().checkpoint(3), server.directory().checkpoint(2)
        raw = bytearray(newest.read_bytes())
        if damage == "flipped":
            raw[len(raw) // 2] ^= 1
        elif damage == "cut":
            del raw[-10:]
        newest.write_bytes(raw)
        if damage == "missing":
            newest.unlink()
        elif damage == "of another run":
            save_checkpoint(newest, {**load_checkpoint(newest), "run": "another"})
        elif damage == "of another round":
            shutil.copyfile(before, newest)
        server.start()
        assert server.wait_for("after")["after"] == 2
        judge(server, 6, server.finish())
