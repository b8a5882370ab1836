"""The nightly faults: a server killed a thousand times and at every durable step, nodes, disks.

    python benchmarks/chaos.py [--kills 1000] [--node-kills 60] [--seed S] [--log FILE] [--quick] [--json]

Every server is a process of its own on the real commit path, with eight deterministic, stateful clients in
three node processes that stay up. Each part is judged by the undisturbed twin (the final model, bit for
bit) and by the ledger check (every round computed again from the replies that the store lists). Prints one
JSON line with the figures, the seed and the commit; what was done goes to the log, a JSON object per line.
The exit status is 1 when a promise was broken.
"""

from __future__ import annotations

import argparse
import errno
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "chaos"))

from chaos_faults import Note, kill_at_random, kill_nodes, operations, sweep  # noqa: E402
from chaos_harness import (  # noqa: E402
    FAIL,
    FAIL_ON,
    SYNC,
    TEAR,
    WRITE,
    Server,
    build_shim,
    federation,
    half_files,
    twin,
    with_shim,
)


def verdict(server: Server, model: str, rounds: int) -> dict[str, Any]:
    """Return what the judges say of a finished run."""
    problems = server.ledger()
    doubled = [problem for problem in problems if "twice" in problem or "times" in problem]
    return {
        "rounds": rounds,
        "model-identical": model == twin(rounds),
        "ledger-problems": problems[:5],
        "double-folds": len(doubled),
        "half-files": len(half_files(server.store)),
    }


def server_kills(folder: Path, kills: int, rng: random.Random, note: Note) -> dict[str, Any]:
    """Kill the server at random moments."""
    rounds = 4 * kills + 20  # A life commits one round at most, unless the first ones were slow.
    with federation(folder, rounds=rounds) as (server, _):
        server.start()
        figures = kill_at_random(server, kills=kills, rng=rng, note=note)
        return figures.document() | verdict(server, server.finish(600), rounds)


def node_kills(folder: Path, kills: int, rng: random.Random, note: Note) -> dict[str, Any]:
    """Kill nodes at random moments, while they train, keep their state and upload."""
    rounds = 6 * kills + 20
    with federation(folder, rounds=rounds) as (server, fleet):
        server.start()
        done = kill_nodes(server, fleet, kills=kills, rng=rng, note=note)
        return {"kills": done} | verdict(server, server.finish(600), rounds)


def steps(folder: Path, note: Note, **fault: Any) -> dict[str, Any]:
    """Let one fault happen at every durable step of a resume and a commit, then at those of a run's end."""
    rounds = 130
    log = folder / "steps"
    folder.mkdir(parents=True)
    environment = with_shim(folder / "runs", log=log)
    with federation(folder, rounds=rounds, forked=True, environment=environment) as (server, _):
        server.start(hold_after=1)
        server.wait_for("committed")
        server.kill()
        log.write_text("")
        commit = sweep(server, hold_after=1, **fault)
        hit = operations(log)
        rounds = len(server.rounds()) + 1
        end = sweep(server, done="finished", rounds=rounds, **fault)
        note({"fault": fault, "steps": commit.steps, "end": end.steps, "operations": hit})
        server.start(rounds=rounds)
        figures = {
            "steps-covered": commit.covered + end.covered,
            "steps": commit.steps + end.steps,
            "operations": dict(hit),
        }
        return figures | verdict(server, server.finish(), rounds)


def good(figures: dict[str, Any]) -> bool:
    return (
        figures["model-identical"]
        and not figures["ledger-problems"]
        and not figures["double-folds"]
        and not figures["half-files"]
        and not figures.get("rounds-lost")
        and figures.get("steps-covered") == figures.get("steps")
    )


def commit_id() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="kills of the server (default 1000)")
    parser.add_argument("--node-kills", type=int, default=60, help="kills of nodes (default 60)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument(
        "--log", type=Path, help="fault log (default: beside the runs, in a temporary folder)"
    )
    parser.add_argument("--quick", action="store_true", help="30 kills of the server, 6 of nodes")
    parser.add_argument("--json", action="store_true", help="no progress, only the line with the figures")
    options = parser.parse_args()
    if options.quick:
        options.kills, options.node_kills = 30, 6
    folder = Path(tempfile.mkdtemp(prefix="turnout-chaos-"))
    log = options.log or folder / "faults.jsonl"
    result = run(options, folder, log)
    print(json.dumps(result))
    return 0 if result["good"] else 1


def run(options: argparse.Namespace, folder: Path, log: Path) -> dict[str, Any]:
    rng = random.Random(options.seed)
    began = time.monotonic()
    result: dict[str, Any] = {"benchmark": "chaos", "seed": options.seed, "commit": commit_id()}
    parts: dict[str, tuple[int, Callable[[Note], dict[str, Any]]]] = {
        "server-kills": (
            options.kills,
            lambda note: server_kills(folder / "server-kills", options.kills, rng, note),
        ),
        "node-kills": (
            options.node_kills,
            lambda note: node_kills(folder / "node-kills", options.node_kills, rng, note),
        ),
    }
    if build_shim() is not None:
        for name, fault in {
            "killed-at-every-step": {},
            "every-write-torn": {"action": TEAR, "kinds": WRITE},
            "disk-full-at-every-write": {
                "action": FAIL_ON,
                "kinds": WRITE,
                "errno": errno.ENOSPC,
                "repair": True,
            },
            "every-sync-fails": {"action": FAIL, "kinds": SYNC, "errno": errno.EIO, "repair": True},
        }.items():
            parts[name] = (1, lambda note, name=name, fault=fault: steps(folder / name, note, **fault))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with (
        log.open("w") as file,
        Progress(*columns, console=Console(stderr=True), disable=options.json) as progress,
    ):
        for name, (total, part) in parts.items():
            task = progress.add_task(name, total=total)

            def note(entry: dict[str, Any], task: Any = task) -> None:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                progress.advance(task)

            result[name] = part(note)
    result["good"] = all(good(result[name]) for name in parts)
    result["seconds"] = round(time.monotonic() - began, 1)
    result["log"] = str(log)
    return result


if __name__ == "__main__":
    sys.exit(main())
