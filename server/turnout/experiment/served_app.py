"""The ClientApp of a node that has no experiment of its own: built from what the server sends."""

from __future__ import annotations

import threading
import tomllib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from turnout.experiment.build import make_app, make_task
from turnout.experiment.model import Experiment
from turnout.experiment.source import Source
from turnout.wire import ConfigError

if TYPE_CHECKING:
    from turnout.tasks import Task

_MAX_CHARACTERS: Final = 1 << 20


class ServedApp(ClientApp):
    """Builds the app at the first message, from the run config's ``experiment``, and keeps it.

    Only registered methods can be named in there, and their options are checked as those of a file are.
    ``device`` replaces the experiment's. A call raises `ConfigError` when the server sends no
    experiment, or an impossible one.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self._device = device
        self._building = threading.Lock()
        self._built: tuple[str, tuple[ClientApp, Task]] | None = None

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer ``message`` as the experiment's clients do."""
        return self._parts(context.run_config)[0](message, context)

    def num_examples(self, client: int, run_config: Mapping[str, Any]) -> int:
        """Return how many examples ``client`` has in the server's experiment; raises as a call does."""
        return self._parts(run_config)[1].num_examples(client)

    def _parts(self, run_config: Mapping[str, Any]) -> tuple[ClientApp, Task]:
        text = run_config.get("experiment")
        if not isinstance(text, str) or not text:
            raise ConfigError(
                "the server sends no experiment: its clients bring an app of their own; start this node with "
                "--app MODULE:ATTRIBUTE, or with the experiment file."
            )
        with self._building:
            if self._built is None or self._built[0] != text:
                self._built = text, self._build(text)
            return self._built[1]

    def _build(self, text: str) -> tuple[ClientApp, Task]:
        if len(text) > _MAX_CHARACTERS:
            raise ConfigError(
                f"the server's experiment has {len(text)} characters, at most {_MAX_CHARACTERS}."
            )
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"the server's experiment is not valid TOML: {error}.") from error
        experiment = Experiment.from_dict(data, source=Source("the server's experiment"))
        task = make_task(experiment)
        return make_app(experiment, task, device=self._device), task
