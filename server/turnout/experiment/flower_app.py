"""An experiment on Flower's engines: what its file and a run config say, and the clients' ``ClientApp``.

Server and clients read the same file and the app's run config, which ``flwr run`` gives to every process. A
SuperNode starts a process per message: nothing is imported here that clients do not need.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from turnout.experiment.build import make_app, make_task
from turnout.experiment.model import Experiment, load_experiment
from turnout.wire.torch_threads import one_torch_thread


def experiment_of(run_config: Mapping[str, Any], file: str | Path) -> Experiment:
    """Return the experiment that an app's run config describes.

    ``experiment`` names a file instead of ``file``, ``set`` is as ``--set`` of the command line, several of
    them separated by spaces (``"run.rounds=5 client.lr=0.05"``), ``strategy`` picks a strategy or an alias of
    ``[strategies.NAME]``. Raises `ConfigError`.
    """
    overrides = str(run_config.get("set", "")).split()
    experiment = load_experiment(str(run_config.get("experiment") or file), overrides)
    strategy = str(run_config.get("strategy") or experiment.strategy.name)
    return experiment if strategy == experiment.strategy.name else experiment.variant(strategy)


class ExperimentApp(ClientApp):
    """The clients of the experiment that the app's run config describes; built at the first message."""

    def __init__(self, file: str | Path) -> None:
        super().__init__()
        self._file = str(file)
        self._built: tuple[dict[str, Any], ClientApp] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_file": self._file, "_built": None}

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer ``message`` as the experiment's clients do."""
        app = self._app(dict(context.run_config))
        with one_torch_thread():
            return app(message, context)

    def _app(self, run_config: dict[str, Any]) -> ClientApp:
        with _building:
            if self._built is None or self._built[0] != run_config:
                experiment = experiment_of(run_config, self._file)
                self._built = run_config, make_app(experiment, make_task(experiment))
            return self._built[1]


_building = threading.Lock()
