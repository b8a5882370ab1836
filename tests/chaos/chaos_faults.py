"""Loops over faults, shared by the tests and the nightly runner; each returns its figures."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_harness import HOSTS, KILL, NAME, SYNC, WRITE, Fault, Fleet, Server, until

Note = Callable[[dict[str, Any]], None]


def ignore(_: dict[str, Any]) -> None:
    pass


@dataclass
class KillFigures:
    """What a series of random kills cost. Durations in seconds."""

    round_seconds: float = 0.0
    kills: int = 0
    rounds_lost: int = 0
    worked: float = 0.0
    repeated: float = 0.0
    listening: list[float] = field(default_factory=list)
    offered: list[float] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {
            "kills": self.kills,
            "round-seconds": round(self.round_seconds, 4),
            "rounds-lost": self.rounds_lost,
            "work-repeated-percent": round(100 * self.repeated / self.worked, 1) if self.worked else 0.0,
            "restart-to-listening-p50": percentile(self.listening, 50),
            "restart-to-first-dispatch-p50": percentile(self.offered, 50),
            "restart-to-first-dispatch-p99": percentile(self.offered, 99),
        }


def percentile(values: list[float], at: int) -> float | None:
    if len(values) < 2:
        return round(values[0], 4) if values else None
    return round(statistics.quantiles(values, n=100, method="inclusive")[at - 1], 4)


def measured_round(server: Server, *, rounds: int = 5) -> float:
    """Return the seconds that a round takes on this machine, from the first ones of ``server``."""
    life = server.life
    until(lambda: life.committed > rounds or life.code is not None, what=lambda: life.lines[-3:])
    times = [float(line["at"]) for line in life.lines if "committed" in line]
    return statistics.median(after - before for before, after in itertools.pairwise(times))


def kill_at_random(server: Server, *, kills: int, rng: random.Random, note: Note = ignore) -> KillFigures:
    """Kill ``server``, which runs, ``kills`` times after U(0, 1.5 rounds) of work; it runs again at the end.

    A round that was reported as committed and is not there after the restart counts as lost.
    """
    figures = KillFigures(round_seconds=measured_round(server))
    for number in range(1, kills + 1):
        server.wait_for("offered")
        wait = rng.uniform(0, 1.5 * figures.round_seconds)
        time.sleep(wait)
        assert server.life.code is None, f"the run ended before kill {number}; give it more rounds"
        server.kill()
        life = server.life
        server.start()
        after = int(server.wait_for("after")["after"])
        figures.kills = number
        figures.rounds_lost += max(0, life.committed - after)
        _count_work(figures, life, after)
        note({"fault": "kill", "number": number, "worked": round(wait, 4), "after": after})
    return figures


def _count_work(figures: KillFigures, life: Any, after: int) -> None:
    offered = life.said("offered")
    if offered is None or life.ended is None:
        return
    figures.listening.append(life.seconds_to("listening"))
    figures.offered.append(life.seconds_to("offered"))
    figures.worked += life.ended - offered["at"]
    if after > life.committed:
        return  # Killed between its commit and saying so: nothing is done again.
    last = max((line["at"] for line in life.lines if "committed" in line), default=offered["at"])
    figures.repeated += life.ended - last


def kill_nodes(server: Server, fleet: Fleet, *, kills: int, rng: random.Random, note: Note = ignore) -> int:
    """Kill a node of ``fleet`` at a random moment, ``kills`` times, and start it again at once."""
    round_seconds = measured_round(server)
    for number in range(1, kills + 1):
        host = rng.choice(HOSTS)
        # Once its node takes part again, so that the moment falls into its work.
        committed = server.life.committed
        until(lambda at=committed: server.life.committed > at, what=lambda: server.life.lines[-3:])
        wait = rng.uniform(0, 1.5 * round_seconds)
        time.sleep(wait)
        assert server.life.code is None, f"the run ended before kill {number}; give it more rounds"
        fleet.nodes[host].kill()
        fleet.nodes[host].wait(10)
        fleet.start(host)
        note({"fault": "kill-node", "number": number, "node": host, "worked": round(wait, 4)})
    return kills


@dataclass
class Sweep:
    """A fault at every step: how many there were, how each life ended, which operations were hit."""

    steps: int = 0
    covered: int = 0
    ends: Counter[int] = field(default_factory=Counter)
    errors: list[dict[str, Any]] = field(default_factory=list)


def sweep(
    server: Server,
    *,
    action: int = KILL,
    kinds: int = WRITE | SYNC | NAME,
    errno: int = 0,
    done: str = "committed",
    repair: bool = False,
    most: int = 400,
    check: Callable[[int], None] | None = None,
    **changes: Any,
) -> Sweep:
    """Start ``server`` with the fault at step 1, 2, 3, ... until a life gets through to ``done`` unharmed.

    ``repair`` starts it once without the fault after each, as the operator would. Committed rounds may
    never become fewer.
    """
    figures = Sweep()
    known = 0
    for at in range(1, most):
        life = server.start(fault=Fault(at, action, kinds, errno), **changes)
        while life.code is None and life.said(done) is None:
            time.sleep(0.002)
        line = life.said(done)
        if line is not None and line["steps"] < at:
            server.kill()
            figures.steps = at - 1
            return figures
        server.wait() if line is None else server.kill()
        figures.covered += 1
        figures.ends[life.code if life.code is not None else 0] += 1
        failed = life.said("failed")
        if failed is not None:
            figures.errors.append(failed)
        if check is not None:
            check(at)
        if done == "committed":
            rounds = server.rounds() if at > 1 else []
            assert rounds == list(range(1, len(rounds) + 1)), f"step {at}: a gap in {rounds}"
            assert len(rounds) >= max(known, life.committed), f"step {at}: {len(rounds)} of {known} rounds"
            known = len(rounds)
        if repair:
            server.start(**changes)
            server.wait_for(done)
            server.kill()
            known = max(known, server.life.committed)
    raise AssertionError(f"no end after {most} steps")


def operations(log: Path) -> Counter[str]:
    """Return how often each kind of step was the one that was hit, from the shim's log."""
    counted: Counter[str] = Counter()
    lines = log.read_text().splitlines()
    for line, following in zip(lines, [*lines[1:], "1 "], strict=True):
        # A life's last step is the one it died at.
        if following.startswith("1 "):
            counted[line.split()[1]] += 1
    return counted
