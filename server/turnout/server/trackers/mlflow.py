"""MLflow, by its client library ``mlflow-skinny``: a server, or an SQLite file of its own."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from turnout.server.schema import RunRow
from turnout.server.trackers.tracker import Status, Tracker, flat

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # Read when the package is imported.

from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

DEFAULT_URI: Final = "sqlite:///mlflow.db"
_RUN_ID: Final = "turnout.run_id"
_MOST_CHARACTERS: Final = 6_000  # Of a parameter's value, MLflow's own limit.
_AT_ONCE: Final = 100  # Parameters in one request, MLflow's own limit.
_STATUS: Final = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class MlflowTracker(Tracker):
    """One MLflow run per Turnout run, in the experiment of the run's name; a resumed run goes on in it.

    ``uri`` is a tracking URI, by default ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working
    directory. MLflow cannot take a step back: rounds that a resumed run computes again are not logged again.
    """

    def __init__(self, uri: str | None) -> None:
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
        self._client = MlflowClient(tracking_uri=uri)
        self._logged = 0

    def start(self, run: RunRow, directory: Path, *, first_round: int) -> None:
        """Find the run that has this run's id as a tag, or make it with the experiment as parameters."""
        client = self._client
        known = client.get_experiment_by_name(run.name)
        experiment = client.create_experiment(run.name) if known is None else known.experiment_id
        found = client.search_runs([experiment], f"tags.`{_RUN_ID}` = '{run.id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            client.update_run(self._id, status="RUNNING")
            self._logged = self._last_step(found[0].data.metrics)
        else:
            tags = {_RUN_ID: run.id, "turnout.strategy": run.strategy, "turnout.task": run.task}
            name = directory.name
            self._id = client.create_run(experiment, tags=tags, run_name=name).info.run_id
        before: Mapping[str, str] = found[0].data.params if found else {}
        self._log_config(run.config, before)

    def log(self, server_round: int, metrics: Mapping[str, float]) -> None:
        """Log the round as a step, unless an earlier part of the run has."""
        if server_round <= self._logged:
            return
        now = int(time.time() * 1000)
        values = [Metric(name, value, now, server_round) for name, value in metrics.items()]
        self._client.log_batch(self._id, metrics=values)
        self._logged = server_round

    def finish(self, status: Status, model_sha256: str | None) -> None:
        """End the run; the final model's hash is the tag ``turnout.model_sha256``."""
        if model_sha256 is not None:
            self._client.set_tag(self._id, "turnout.model_sha256", model_sha256)
        self._client.set_terminated(self._id, status=_STATUS[status])

    def _last_step(self, metrics: Mapping[str, Any]) -> int:
        name = next((name for name in metrics if name.startswith("clients/")), None)
        if name is None:
            return 0
        return max(int(metric.step) for metric in self._client.get_metric_history(self._id, name))

    def _log_config(self, config: Mapping[str, Any], before: Mapping[str, str]) -> None:
        """Log what was not logged; MLflow's parameters never change, so what has changed becomes a tag."""
        values = {key: str(value)[:_MOST_CHARACTERS] for key, value in flat(config).items()}
        new = [Param(key, value) for key, value in values.items() if key not in before]
        tags = [
            RunTag(f"resumed.{key}", value)
            for key, value in values.items()
            if key in before and before[key] != value
        ]
        for at in range(0, len(new), _AT_ONCE):
            self._client.log_batch(self._id, params=new[at : at + _AT_ONCE])
        if tags:
            self._client.log_batch(self._id, tags=tags)
