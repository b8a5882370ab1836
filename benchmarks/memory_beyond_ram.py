"""Per-client vectors that do not fit in memory: seconds per round with ``memory="mmap"``, and checkpoints.

    python benchmarks/memory_beyond_ram.py [--clients 10000] [--parameters 655360] [--directory DIR]

FedStale keeps one vector per client: 10,000 x 655,360 float32 are 26 GB. First every client takes part once,
100 in a round, so that all vectors exist; then 100 random ones take part in each round, whose old vectors are
read and new ones written. After each round a checkpoint is made as a recorded run makes it, two are kept, and
the rows of older ones are used again. The strategy is driven directly, so the figures are the memory's and
not those of messages and clients. Beside them: the same rounds with ``memory="ram"`` and as many clients as
fit in 2 GB, and what the disk does in the same run, which bounds both. Needs the vectors' size and 5 % in
DIR; everything is deleted at the end. Prints one JSON line, its progress on standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from turnout.simulation import Sampled
from turnout.strategies import FedStale, Reply
from turnout.wire import save_checkpoint
from turnout.wire.checkpoint import row_references
from turnout.wire.row_file import RowReference

COHORT = 100
Cohort = Callable[[int], list[int]]


class Run:
    """One run of FedStale with a checkpoint after every round."""

    def __init__(self, folder: Path, memory: str, clients: int, parameters: int) -> None:
        self.folder, self.clients, self.round = folder, clients, 0
        self.strategy = FedStale(memory=memory, num_clients=clients, participation=COHORT / clients)
        self.strategy.prepare(np.zeros(parameters, np.float32))
        self.noise = np.random.default_rng(0).standard_normal(parameters).astype(np.float32)
        self.kept: list[tuple[Path, list[RowReference]]] = []
        self.checkpoint_seconds: list[float] = []
        self.checkpoint_bytes = 0

    def rounds(self, count: int, cohort: Cohort) -> list[float]:
        """Run ``count`` rounds and return the seconds of each."""
        seconds = []
        for _ in range(count):
            self.round += 1
            began = time.perf_counter()
            self._one(cohort(self.round))
            seconds.append(time.perf_counter() - began)
            if self.round % 20 == 0:
                print(
                    f"round {self.round}: {seconds[-1]:.2f} s, resident {resident() / 1e6:.0f} MB",
                    file=sys.stderr,
                )
        return seconds

    def _one(self, cohort: list[int]) -> None:
        self.strategy.begin_round(self.round, range(self.clients))
        self.strategy.select(self.round, cohort)
        for node in cohort:
            row = self.strategy.clients.identify(node, node, self.round)
            update = self.noise * np.float32(1 + (node + self.round) % 7)
            self.strategy.accept(self.round, Reply(row, update, 10, float(np.abs(update).max())))
        self.strategy.end_round(self.round)
        self._checkpoint()

    def _checkpoint(self) -> None:
        """As `RunRecorder` does it."""
        began = time.perf_counter()
        path = self.folder / f"round-{self.round:06d}.safetensors"
        self.strategy.keep_rows(self.folder, "benchmark")
        tree = {"round": self.round, "strategy": self.strategy.state_dict()}
        save_checkpoint(path, tree)
        self.checkpoint_seconds.append(time.perf_counter() - began)
        self.checkpoint_bytes = path.stat().st_size
        self.kept.append((path, list(row_references(tree))))
        if len(self.kept) > 2:
            self.kept.pop(0)[0].unlink()
            for rows in self.kept[0][1]:
                rows.forget_older()


def resident() -> int:
    """Return the resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def disk_limits(folder: Path, row_bytes: int) -> dict[str, float]:
    """Return MB/s of writing rows one after the other, then synced, and of reading them in any order."""
    count = max(8, min(400, (1 << 30) // row_bytes))
    row = np.random.default_rng(0).integers(0, 255, row_bytes, np.uint8).data
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for i in range(count):
            os.pwrite(file.fileno(), row, i * row_bytes)
        os.fsync(file.fileno())
        written = count * row_bytes / (time.perf_counter() - began)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        for i in np.random.default_rng(1).permutation(count).tolist():
            os.pread(file.fileno(), row_bytes, i * row_bytes)
        read = count * row_bytes / (time.perf_counter() - began)
    return {"write_mb_s": written / 1e6, "read_mb_s": read / 1e6}


def summary(seconds: list[float]) -> dict[str, float]:
    """Return median, mean and the slowest."""
    values: npt.NDArray[np.float64] = np.asarray(seconds)
    return {"median": float(np.median(values)), "mean": float(values.mean()), "slowest": float(values.max())}


def beyond_ram(folder: Path, clients: int, parameters: int, rounds: int) -> dict[str, object]:
    """Fill the memory, run random rounds, and return the figures."""
    run = Run(folder, "mmap", clients, parameters)
    sampled = Sampled(clients, COHORT, seed=1)
    before = resident()
    filling = run.rounds(
        -(-clients // COHORT), lambda r: list(range((r - 1) * COHORT, min(r * COHORT, clients)))
    )
    after_filling = resident()
    run.checkpoint_seconds.clear()
    random = run.rounds(rounds, lambda r: sampled.present(r).tolist())
    (file,) = folder.glob("*.rows")
    return {
        "vectors_gb": clients * parameters * 4 / 1e9,
        "file_gb": file.stat().st_size / 1e9,
        "first_seen_seconds": summary(filling),
        "round_seconds": summary(random),
        "of_that_checkpoint_seconds": summary(run.checkpoint_seconds),
        "checkpoint_mb": run.checkpoint_bytes / 1e6,
        "resident_mb": {"before": before / 1e6, "filled": after_filling / 1e6, "end": resident() / 1e6},
        "moved_mb_a_round": {"read": COHORT * parameters * 4 / 1e6, "written": COHORT * parameters * 4 / 1e6},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--parameters", type=int, default=655_360)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--baseline-mb", type=int, default=2000, help="vectors kept by the run in RAM")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    row_bytes = 4 * options.parameters
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    figures: dict[str, object] = {"benchmark": "memory-beyond-ram", "ram_gb": total / 1e9}
    figures |= {"clients": options.clients, "parameters": options.parameters, "cohort": COHORT}
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="turnout-beyond-ram-") as name:
        folder = Path(name)
        figures["disk_before"] = disk_limits(folder, row_bytes)
        few = max(COHORT, options.baseline_mb * 10**6 // row_bytes // COHORT * COHORT)
        (folder / "ram").mkdir()
        baseline = Run(folder / "ram", "ram", few, options.parameters)
        figures["ram_round_seconds"] = summary(
            baseline.rounds(10, lambda r: Sampled(few, COHORT, seed=1).present(r).tolist())
        )
        del baseline
        (folder / "mmap").mkdir()
        figures |= beyond_ram(folder / "mmap", options.clients, options.parameters, options.rounds)
        figures["disk_after"] = disk_limits(folder, row_bytes)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
