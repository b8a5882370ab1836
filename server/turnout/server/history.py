"""A run's history as arrays (for plots and tables) and as documents (the lines of metrics.jsonl)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from turnout.server.round_writer import MetricKind
from turnout.server.schema import RoundRow, RunRow
from turnout.server.store import RunStore
from turnout.wire import NDArray

# How a client's round can have gone, in the order of the codes in `RunHistory.outcome`.
OUTCOMES: Final = ("absent", "ok", "failed", "rejected", "missing")


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """Everything that was committed of one run.

    ``rounds`` and ``participants`` have one entry per committed round. ``client_round``, ``client``,
    ``outcome`` (a code, see `OUTCOMES`) and ``weight`` (NaN for none) have one entry per invitation.
    ``evaluate`` holds the held-out metrics as (rounds, values), round 0 being the initial model.
    """

    label: str
    num_clients: int
    rounds: NDArray
    participants: NDArray
    evaluate: Mapping[str, tuple[NDArray, NDArray]]
    client_round: NDArray
    client: NDArray
    outcome: NDArray
    weight: NDArray

    @classmethod
    def load(cls, store: RunStore, run: RunRow, label: str | None = None) -> RunHistory:
        """Read a run from the store; ``label`` defaults to its strategy."""
        rounds = store.rounds(run.id)
        outcomes = store.outcomes(run.id)
        names = sorted({row.name for row in store.metrics(run.id, "evaluate")})
        evaluate = {}
        for name in names:
            series = store.series(run.id, "evaluate", name)
            evaluate[name] = np.array([r for r, _ in series]), np.array([value for _, value in series])
        return cls(
            label=run.strategy if label is None else label,
            num_clients=run.num_clients,
            rounds=np.array([row.round for row in rounds], dtype=np.int64),
            participants=np.array([row.participants for row in rounds], dtype=np.int64),
            evaluate=evaluate,
            client_round=np.array([row[0] for row in outcomes], dtype=np.int64),
            client=np.array([row[1] for row in outcomes], dtype=np.uint64),
            outcome=np.array([OUTCOMES.index(row[2]) for row in outcomes], dtype=np.int8),
            weight=np.array([np.nan if row[3] is None else row[3] for row in outcomes], dtype=float),
        )

    def metric(self, name: str) -> tuple[NDArray, NDArray]:
        """Return rounds and values of a held-out metric; both empty when it was not measured."""
        return self.evaluate.get(name, (np.empty(0, np.int64), np.empty(0)))

    def clients(self) -> NDArray:
        """Return the ids of all clients: 0 to N-1, or those seen when the ids are not of that form."""
        seen = np.unique(self.client)
        if seen.size and int(seen[-1]) >= self.num_clients:
            return seen
        return np.arange(self.num_clients, dtype=np.uint64)

    def presence(self) -> NDArray:
        """Return for every client the share of rounds in which it took part."""
        return self._sum_by_client(np.ones(len(self.client))) / max(len(self.rounds), 1)

    def weight_shares(self) -> NDArray:
        """Return for every client its share of all the weight that was given in the run."""
        total = self._sum_by_client(np.nan_to_num(self.weight))
        whole = float(total.sum())
        return total / whole if whole > 0 else total

    def weight_gini(self) -> float:
        """Return the Gini coefficient of the weight shares: 0 when all count the same, 1 when one does."""
        shares = np.sort(self.weight_shares())
        if not shares.size or shares.sum() <= 0:
            return float("nan")
        ranks = np.arange(1, len(shares) + 1)
        return float(
            2 * (ranks * shares).sum() / (len(shares) * shares.sum()) - (len(shares) + 1) / len(shares)
        )

    def _sum_by_client(self, values: NDArray) -> NDArray:
        clients = self.clients()
        took_part = self.outcome == OUTCOMES.index("ok")
        index = np.searchsorted(clients, self.client[took_part])
        return np.bincount(index, weights=values[took_part], minlength=len(clients))


def round_line(row: RoundRow, metrics: Mapping[MetricKind, Mapping[str, float]]) -> dict[str, Any]:
    """Return the document of one round: how many took part, seconds by phase, metrics by kind."""
    return {
        "round": row.round,
        "invited": row.invited,
        "participants": row.participants,
        "failed": row.failed,
        "rejected": row.rejected,
        "missing": row.missing,
        "seconds": {
            "select": row.select_seconds,
            "train": row.train_seconds,
            "fold": row.fold_seconds,
            "finish": row.finish_seconds,
            "evaluate": row.evaluate_seconds,
        },
        **{kind: dict(sorted(values.items())) for kind, values in metrics.items() if values},
    }


def metrics_lines(store: RunStore, run_id: str) -> Iterator[dict[str, Any]]:
    """Yield the document of every committed round of a run, the initial evaluation (round 0) first."""
    by_round: dict[int, dict[MetricKind, dict[str, float]]] = {}
    for metric in store.metrics(run_id):
        kinds = by_round.setdefault(metric.round, {"train": {}, "evaluate": {}, "diagnostics": {}})
        kinds[metric.kind][metric.name] = float("nan") if metric.value is None else metric.value  # type: ignore[index]
    if 0 in by_round:
        yield {"round": 0, **{kind: values for kind, values in by_round[0].items() if values}}
    for row in store.rounds(run_id):
        yield round_line(row, by_round.get(row.round, {}))
