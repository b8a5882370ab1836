"""What a run shows to Prometheus: a callback, for simulations as for fleets."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import Counter, Gauge, Histogram

from turnout.server.metrics.client_metrics import ClientMetrics
from turnout.strategies import Callback, RoundReport
from turnout.wire import ConfigError
from turnout.wire.metrics_registry import MetricsRegistry

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Result

    from turnout.server.recorder import RunRecorder
    from turnout.strategies import StreamingStrategy

#: From rounds of a tenth of a second to one hour.
SECONDS: Final[Sequence[float]] = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600)
#: Parts of a round may be much shorter.
PART_SECONDS: Final[Sequence[float]] = (0.0001, 0.001, 0.01, *SECONDS)
PHASES: Final = ("select", "train", "finish", "evaluate")
OUTCOMES: Final = ("ok", "failed", "rejected", "missing")
MOST_PER_CLIENT: Final = 200


@dataclass(frozen=True)
class _Checkpoints:
    seconds: Histogram
    size: Gauge


class MetricsCallback(Callback):
    """Puts a run's rounds into ``registry``; goes last in ``callbacks``, so that a round's time is all of it.

    Parameters
    ----------
    registry
        Where the metrics are; one callback per registry.
    run, strategy
        Labels of the run: its id and its strategy's name. They are gone when the run has finished.
    recorder
        The run's recorder, whose checkpoints are then measured.
    per_client
        Also give every client gauges of its own, with its id as label; for at most 200 clients, because
        each client then costs a hundred lines per scrape.

    Raises
    ------
    ConfigError
        When a run with ``per_client`` has more than 200 clients.
    """

    def __init__(
        self,
        registry: MetricsRegistry,
        *,
        run: str,
        strategy: str,
        recorder: RunRecorder | None = None,
        per_client: bool = False,
    ) -> None:
        self._run, self._strategy, self._recorder = run, strategy, recorder
        self._rounds = Counter("turnout_rounds", "Rounds committed.", registry=registry)
        self._round_seconds = Histogram(
            "turnout_round_seconds", "Duration of a round, from one commit to the next.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._phase_seconds = Histogram(
            "turnout_round_phase_seconds",
            "Duration of a round's phases; training includes waiting for clients and folding.",
            ("phase",), buckets=PART_SECONDS, registry=registry,
        )  # fmt: skip
        self._fold_seconds = Histogram(
            "turnout_fold_seconds", "Time per round spent on folding replies.",
            buckets=PART_SECONDS, registry=registry,
        )  # fmt: skip
        self._replies = Counter(
            "turnout_client_replies", "Invitations by outcome.", ("outcome",), registry=registry
        )
        for outcome in OUTCOMES:
            self._replies.labels(outcome)
        self._cohort = Gauge("turnout_cohort_size", "Clients invited to the last round.", registry=registry)
        self._quorum_missed = Counter(
            "turnout_quorum_missed",
            "Rounds with fewer good replies than the quorum (in a simulation: with none).",
            registry=registry,
        )
        self._last_commit = Gauge(
            "turnout_last_commit_timestamp_seconds", "Unix time of the last commit.", registry=registry
        )
        self._info = Gauge(
            "turnout_run_info", "The live run; the value is 1.", ("run", "strategy"), registry=registry
        )
        self._loss = Gauge(
            "turnout_run_loss",
            "Last loss of the live run: on held-out data where the model is evaluated, else in training.",
            ("run",), registry=registry,
        )  # fmt: skip
        self._checkpoints = _checkpoints(registry) if recorder is not None else None
        self._clients = ClientMetrics(registry, per_client=per_client)
        self._per_client = per_client
        self._memory = registry.memory
        self._has_loss = False
        self._began = time.monotonic()

    def on_start(self, strategy: StreamingStrategy, *, num_rounds: int, first_round: int) -> None:
        """Show the run as live."""
        known = strategy.num_clients or 0
        if self._recorder is not None:
            known = max(known, self._recorder.run.num_clients)
        self._check_size(known)
        self._info.labels(self._run, self._strategy).set(1)
        self._began = time.monotonic()

    def on_round_end(self, report: RoundReport) -> None:
        """Add one round."""
        now = time.monotonic()
        self._round_seconds.observe(now - self._began)
        self._began = now
        self._rounds.inc()
        self._last_commit.set(time.time())
        for phase in PHASES:
            self._phase_seconds.labels(phase).observe(report.seconds.get(phase, 0.0))
        self._fold_seconds.observe(report.seconds.get("fold", 0.0))
        outcomes = [client.outcome for client in report.clients]
        for outcome in OUTCOMES:
            self._replies.labels(outcome).inc(outcomes.count(outcome))
        self._cohort.set(len({client.client for client in report.clients}))
        if outcomes.count("ok") < _quorum(report.grid):
            self._quorum_missed.inc()
        self._memory.labels("strategy").set(report.diagnostics.get("memory-bytes", math.nan))
        loss = report.evaluate_metrics.get("loss", report.train_metrics.get("train-loss"))
        if loss is not None:
            self._loss.labels(self._run).set(loss)
            self._has_loss = True
        if self._recorder is not None and self._checkpoints is not None:
            written = self._recorder.last_checkpoint
            if written is not None and written.server_round == report.server_round:
                self._checkpoints.seconds.observe(written.seconds)
                self._checkpoints.size.set(written.bytes)
        self._check_size(report.strategy.clients.registered)
        self._clients.add(report)

    def on_finish(self, strategy: StreamingStrategy, result: Result) -> None:
        """Take the run's own labels out: it is not live any more."""
        self._info.remove(self._run, self._strategy)
        if self._has_loss:
            self._loss.remove(self._run)

    def _check_size(self, clients: int) -> None:
        if self._per_client and clients > MOST_PER_CLIENT:
            raise ConfigError(
                f"per_client=True (--per-client-metrics) is for at most {MOST_PER_CLIENT} clients and this "
                f"run has {clients}; leave it out: the run store has every client's numbers, and exemplars "
                "name clients."
            )


def _checkpoints(registry: MetricsRegistry) -> _Checkpoints:
    return _Checkpoints(
        Histogram(
            "turnout_checkpoint_seconds", "Time to write a checkpoint and sync it to disk.",
            buckets=PART_SECONDS, registry=registry,
        ),
        Gauge("turnout_checkpoint_bytes", "Size of the newest checkpoint.", registry=registry),
    )  # fmt: skip


def _quorum(grid: Any) -> int:
    """Return how many replies a round needs: a fleet's option; 1 for grids that know none."""
    options = getattr(getattr(grid, "server", None), "options", None)
    return int(getattr(options, "quorum", 1))
