"""Which systems there are, and how they take turns at one workload."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fleet_parties import Party
from simulators_blazefl import blazefl
from simulators_flower import flower_ray
from simulators_loops import textbook, tight, variants
from simulators_pfl import pfl
from simulators_turnout import turnout
from simulators_turns import cores
from simulators_work import Federation, Workload

ROUND_SECONDS = 600.0
TOLERANCE = 1e-3  # Of the way that the model went; float32 sums in another order give about 1e-5.
INSTALL = "make bench"
# A setting whose first round is so slow is not tried any further, if another one is so much faster.
HOPELESS_SECONDS, HOPELESS_TIMES = 60.0, 10.0


@dataclass(frozen=True)
class System:
    """A way to run a workload. ``kind``: turnout, peer, loop or limit; ``package`` is what it needs.

    Of systems with the same ``name``, which differ in ``setting``, the fastest is measured.
    """

    name: str
    kind: str
    target: Callable[..., None]
    setting: str = ""
    arguments: tuple[Any, ...] = ()
    package: str = ""

    @property
    def missing(self) -> str:
        """Why this system cannot run here; nothing if it can."""
        if not self.package or find_spec(self.package) is not None:
            return ""
        return f"{self.name}: the package {self.package} is not installed ({INSTALL} installs it)"


@dataclass
class Measured:
    """A system's figures: seconds per round of each turn, and the model after the common rounds."""

    system: System
    warm: float
    model: np.ndarray[Any, Any]
    seconds: list[float] = field(default_factory=list)
    memory_mb: float = 0.0
    also_tried: dict[str, float] = field(default_factory=dict)
    watched: list[dict[str, float]] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds per round."""
        return statistics.median(self.seconds or [self.warm])


def systems(work: Workload, executors: Sequence[str], peers: Sequence[str], loops: bool) -> list[System]:
    """Return what is measured; each peer in every setting that could be its best."""
    every = [System(f"turnout {name}", "turnout", turnout, arguments=(name,)) for name in executors]
    if "pfl" in peers:
        every.append(System("pfl", "peer", pfl, "1 process, 1 thread", (1, 1), "pfl"))
        if cores() > 1:
            every += [
                System("pfl", "peer", pfl, f"{cores()} processes", (cores(), 1), "pfl"),
                System("pfl", "peer", pfl, "1 process, all threads", (1, cores()), "pfl"),
            ]
    if "blazefl" in peers:
        # Clients side by side have a thread each; forked processes may use nothing of their parent's pool.
        every += [
            System("blazefl", "peer", blazefl, name, (name, 1), "blazefl")
            for name in ("serial", "threads", "processes")
        ]
        if cores() > 1:
            every.append(
                System("blazefl", "peer", blazefl, "serial, all threads", ("serial", cores()), "blazefl")
            )
    if "flower" in peers:
        every += [
            System("flower ray", "peer", flower_ray, f"polls every {1e3 * pull:g} ms", (pull,), "ray")
            for pull in (0.1, 0.005)
        ]
    if loops:
        every += [
            System("textbook loop", "loop", textbook, f"threads: {count}", (count,))
            for count in sorted({1, cores()})
        ]
        for name in variants(work):
            # A gradient written by hand is for that one model, so it is shown and not taken as the limit.
            kind = "loop" if name == "by-hand" else "limit"
            every.append(System(f"tight loop, {name}", kind, tight, arguments=(name,)))
    return every


Watch = Callable[[], contextlib.AbstractContextManager[dict[str, float]]]


def measure(
    work: Workload,
    every: Sequence[System],
    *,
    common: int,
    turns: int,
    seconds: float,
    watch: Watch | None = None,
) -> tuple[list[Measured], list[str]]:
    """Return each system's figures, and why others were left out.

    All first run the same ``common`` rounds; then each has a block of about ``seconds`` in every turn, during
    which ``watch`` collects further figures.
    """
    skipped = sorted({system.missing for system in every if system.missing})
    with tempfile.TemporaryDirectory(prefix="simulators-") as folder, contextlib.ExitStack() as stack:
        started: list[tuple[Party, Measured]] = []
        for party, system in _ready(work, every, stack, skipped):
            try:
                known = min(
                    (row.warm for _, row in started if row.system.name == system.name), default=math.inf
                )
                started.append((party, _warm_up(party, system, common, Path(folder) / "model.npy", known)))
            except RuntimeError as error:
                _skip(party, system, error, skipped)
        kept = _fastest(started)
        for turn in range(turns):
            for party, row in kept:
                rounds = max(1, round(seconds / row.warm))
                with watch() if watch else contextlib.nullcontext({}) as seen:
                    sample = party.round(ROUND_SECONDS, what=f"rounds {rounds}")
                row.watched.append(seen)
                row.seconds.append(sample["seconds"] / rounds)
                row.memory_mb = sample["memory_mb"]
            _say(f"{work}: turn {turn + 1}/{turns}")
    return [row for _, row in kept], skipped


def _ready(
    work: Workload, every: Sequence[System], stack: contextlib.ExitStack, skipped: list[str]
) -> list[tuple[Party, System]]:
    """Start the systems that can run here; those that cannot are noted in ``skipped``.

    All at once, for a start is imports and data; engines of Ray look for free ports, one after the other.
    """
    present = [system for system in every if not system.missing]
    groups = [[s for s in present if s.package != "ray"], *([s] for s in present if s.package == "ray")]
    ready = []
    for group in groups:
        begun = [
            (stack.enter_context(Party(system.target, work, *system.arguments, name=system.name)), system)
            for system in group
        ]
        for party, system in begun:
            try:
                ready.append((party.ready(), system))
            except RuntimeError as error:
                _skip(party, system, error, skipped)
    return ready


def _skip(party: Party, system: System, error: RuntimeError, skipped: list[str]) -> None:
    party.close()
    _say(f"{system.name} {system.setting}: {error}")
    skipped.append(f"{system.name} {system.setting}: {error}")


def chosen(rows: Sequence[Measured]) -> dict[str, str]:
    """Return the setting that each system was fastest in, by its name."""
    return {row.system.name: row.system.setting for row in rows}


def narrowed(every: Sequence[System], settings: Mapping[str, str]) -> list[System]:
    """Return of each system in ``settings`` only that one."""
    return [system for system in every if settings.get(system.name, system.setting) == system.setting]


def _warm_up(party: Party, system: System, common: int, path: Path, known: float) -> Measured:
    """Run the common rounds; ``known`` are the seconds per round of another setting of the same system."""
    first = party.round(ROUND_SECONDS, what="rounds 1")["seconds"]
    if first > HOPELESS_SECONDS and first > HOPELESS_TIMES * known:
        raise RuntimeError(f"its first round took {first:.0f} s, in another setting {known:.2f} s")
    warm = party.round(ROUND_SECONDS, what=f"rounds {common - 1}")["seconds"] / (common - 1)
    party.round(what=f"save {path}")
    _say(f"{system.name} {system.setting}: first round {first:.2f} s, then {1e3 * warm:.1f} ms")
    return Measured(system, warm, np.load(path))


def _fastest(started: Sequence[tuple[Party, Measured]]) -> list[tuple[Party, Measured]]:
    """Keep of each name the setting that was fastest in the common rounds, and end the others."""
    best: dict[str, tuple[Party, Measured]] = {}
    for party, row in started:
        if row.system.name not in best or row.warm < best[row.system.name][1].warm:
            best[row.system.name] = (party, row)
    for party, row in started:
        if best[row.system.name][1] is not row:
            party.close()
            best[row.system.name][1].also_tried[row.system.setting] = row.warm
    return list(best.values())


def figures(work: Workload, rows: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return one row of figures per system; ratios are medians over the turns, of rates."""
    task = Federation(work)
    initial, reference = task.initial().numpy(), _reference(rows)
    way = float(np.linalg.norm(reference.model - initial))
    peer = min((row for row in rows if row.system.kind == "peer"), key=_median, default=None)
    limit = min((row for row in rows if row.system.kind == "limit"), key=_median, default=None)
    result = []
    for row in rows:
        away = float(np.linalg.norm(row.model - reference.model)) / way if way else 0.0
        result.append(
            {
                "system": row.system.name,
                "kind": row.system.kind,
                "setting": row.system.setting,
                "model": work.model,
                "clients": work.clients,
                "cohort": work.cohort,
                "steps": work.steps,
                "updates_per_s": work.cohort / row.median,
                "samples_per_s": work.cohort * work.examples * work.epochs / row.median,
                "seconds_per_round": row.median,
                "slowest_turn": max(row.seconds or [row.warm]),
                "fastest_turn": min(row.seconds or [row.warm]),
                "of_best_peer": _ratio(row, peer),
                "of_limit": _ratio(row, limit),
                **task.score(row.model),
                "distance": away,
                "agrees": away < TOLERANCE,
                "memory_mb": row.memory_mb,
                "also_tried_seconds_per_round": row.also_tried,
            }
        )
    return result


def _median(row: Measured) -> float:
    return row.median


def _reference(rows: Sequence[Measured]) -> Measured:
    """Return what the others' models are compared with: the textbook loop where it runs."""
    return next((row for row in rows if row.system.name == "textbook loop"), rows[0])


def _ratio(row: Measured, other: Measured | None) -> float | None:
    if other is None:
        return None
    return statistics.median(b / a for a, b in zip(row.seconds, other.seconds, strict=True))


def fixed_costs(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each system's cost of a round and of a client: a line through its cohort sizes."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["system"], row["clients"]), []).append(row)
    result = []
    for (model, system, clients), group in groups.items():
        if len({row["cohort"] for row in group}) < 2:
            continue
        slope, fixed = np.polyfit(
            [row["cohort"] for row in group], [row["seconds_per_round"] for row in group], 1
        )
        result.append(
            {"system": system, "model": model, "clients": clients, "fixed_ms_per_round": 1e3 * float(fixed),
             "ms_per_client": 1e3 * float(slope)}
        )  # fmt: skip
    return result


def quiet_peers() -> None:
    """Keep progress bars and reports of use out of the parties; call it before any of them starts."""
    os.environ |= {"TQDM_DISABLE": "1", "RAY_USAGE_STATS_ENABLED": "0", "FLWR_TELEMETRY_ENABLED": "0"}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
