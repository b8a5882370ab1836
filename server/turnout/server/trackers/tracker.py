"""What a tracker is, how one is named, and what it is told of a round."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

from turnout.server.schema import RunRow
from turnout.strategies import RoundReport
from turnout.wire import ConfigError, unknown_name

Status = Literal["finished", "interrupted", "failed"]
# Slug: the module to import, the extra that brings it.
_NEEDS: Final = {"tensorboard": ("tensorboard", "tensorboard"), "mlflow": ("mlflow", "mlflow")}


class Tracker(ABC):
    """Shows one run elsewhere. Its methods are called one after the other, on a thread of its own."""

    @abstractmethod
    def start(self, run: RunRow, directory: Path, *, first_round: int) -> None:
        """Begin, or go on at ``first_round``: what was logged from that round on is computed again."""

    @abstractmethod
    def log(self, server_round: int, metrics: Mapping[str, float]) -> None:
        """Show a round's metrics, all of them finite; names are ``group/name``."""

    @abstractmethod
    def finish(self, status: Status, model_sha256: str | None) -> None:
        """Write what is left, with the hash of the final model if the run is finished."""


@dataclass(frozen=True)
class TrackerSpec:
    """A tracker as it is asked for: ``tensorboard[:DIR]`` or ``mlflow[:URI]``."""

    slug: str
    place: str | None = None

    @classmethod
    def parse(cls, text: str) -> TrackerSpec:
        """Return what ``text`` names. Raises `ConfigError` for what is not known or not installed."""
        slug, colon, place = text.partition(":")
        if slug not in _NEEDS:
            raise unknown_name("tracker", slug, _NEEDS)
        if colon and not place:
            raise ConfigError(f"tracker {text!r}: nothing follows the colon; write {slug} or {slug}:PLACE.")
        module, extra = _NEEDS[slug]
        if find_spec(module) is None:
            raise ConfigError(
                f"tracker {slug!r} needs a package that is not installed: pip install 'turnout[{extra}]'"
            )
        return cls(slug, place or None)

    def make(self) -> Tracker:
        """Return a new tracker, for one run."""
        if self.slug == "tensorboard":
            from turnout.server.trackers.tensorboard import TensorBoardTracker

            return TensorBoardTracker(self.place)
        from turnout.server.trackers.mlflow import MlflowTracker

        return MlflowTracker(self.place)


def round_metrics(report: RoundReport) -> dict[str, float]:
    """Return what trackers show of a round: ``evaluate/...``, ``train/...``, ``clients/...``,
    ``seconds/...``, ``diagnostics/...``; numbers that are not finite are left out.
    """
    outcomes = [client.outcome for client in report.clients]
    groups: dict[str, Mapping[str, float]] = {
        "evaluate": report.evaluate_metrics,
        "train": report.train_metrics,
        "diagnostics": report.diagnostics,
        "seconds": report.seconds,
        "clients": {
            outcome: float(outcomes.count(outcome)) for outcome in ("ok", "failed", "rejected", "missing")
        },
    }
    return {
        f"{group}/{name}": float(value)
        for group, metrics in groups.items()
        for name, value in metrics.items()
        if math.isfinite(value)
    }


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a resolved experiment as ``section.key``: value."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values
