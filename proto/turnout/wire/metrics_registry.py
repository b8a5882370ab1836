"""The registry that the metrics of one process are in, with what holds for the process as a whole."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Gauge, disable_created_metrics

_STATM: Final = Path("/proc/self/statm")


class MetricsRegistry(CollectorRegistry):
    """A registry of its own, never the global one, with the versions and the process's memory in it.

    ``memory`` is ``turnout_memory_bytes{kind}``; who has memory to report adds its kind.
    """

    def __init__(self) -> None:
        super().__init__()
        disable_created_metrics()  # type: ignore[no-untyped-call]
        versions = {name: _version(name) for name in ("turnout", "flwr", "torch")}
        build = Gauge(
            "turnout_build_info",
            "Versions of what this process runs; the value is 1.",
            ("version", "flwr", "torch"),
            registry=self,
        )
        build.labels(versions["turnout"], versions["flwr"], versions["torch"]).set(1)
        self.memory = Gauge(
            "turnout_memory_bytes",
            "Memory by kind: of the whole process, of the strategy's state.",
            ("kind",),
            registry=self,
        )
        if _STATM.exists():
            self.memory.labels("process").set_function(_resident_bytes)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _resident_bytes() -> float:
    return float(int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
