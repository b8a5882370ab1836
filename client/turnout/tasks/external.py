"""The task of clients that bring a ClientApp and data of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flwr.app import ArrayRecord

from turnout.tasks.task import ClientData, Task
from turnout.tasks.validation import check_count
from turnout.wire.errors import CheckpointError, ConfigError
from turnout.wire.model_file import read_model
from turnout.wire.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("external", kind="task", summary="Clients bring a ClientApp and data of their own")
class External(Task):
    """``num_clients`` clients of which nothing is known but the model that they start from.

    There is nothing to evaluate on, so runs have the clients' metrics only. Raises `ConfigError` for a file
    that cannot be read.

    model
        A safetensors file with the initial model.
    app
        The clients' Flower app, ``module:attribute``, for a simulation; a fleet's nodes name it themselves.
    """

    name = "external"

    def __init__(self, *, model: str, num_clients: int, app: str | None = None) -> None:
        check_count("num_clients", num_clients, low=1)
        self.num_clients = num_clients
        self.app = app
        try:
            self._initial = read_model(model)
        except CheckpointError as error:
            raise ConfigError(f"model={model!r}: {error} Name a safetensors file.") from error

    def initial_arrays(self) -> ArrayRecord:
        """Return the arrays of the file."""
        return self._initial

    def evaluate(self, arrays: ArrayRecord) -> dict[str, float]:
        """Return nothing: the server has no data."""
        return {}

    def model(self) -> nn.Module:
        """Raise `ConfigError`: the model's code is the clients'."""
        raise _only_clients()

    def client_data(self, client: int) -> ClientData:
        """Raise `ConfigError`: the data are the clients'."""
        raise _only_clients()

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Raise `ConfigError`: the loss is the clients'."""
        raise _only_clients()


def _only_clients() -> ConfigError:
    return ConfigError(
        "task 'external' has no model code and no data; its clients run with turnout client --app "
        "MODULE:ATTRIBUTE."
    )
