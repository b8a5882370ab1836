"""What a resumed server needs to know of a run without reading its data again.

The initial model and, where it follows from the data, how often clients take part. Both are computed with
PyTorch and the task's data when the run is made, and kept in its directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from flwr.app import ArrayRecord

from turnout.experiment.participation import Clients, build_participation, depends_on_data
from turnout.experiment.sections import Method
from turnout.server.documents import write_atomically
from turnout.simulation.participation import ParticipationModel
from turnout.wire import NDArray
from turnout.wire.model_file import model_bytes, read_model

_MODEL: Final = "initial.safetensors"
_PROBABILITIES: Final = "participation.json"


def keep_initial(directory: Path, arrays: ArrayRecord) -> None:
    """Write the initial model into the run directory ``directory``."""
    write_atomically(directory / "model" / _MODEL, model_bytes(arrays))


def read_initial(directory: Path) -> ArrayRecord | None:
    """Return the initial model that `keep_initial` wrote; None when the run has none, as simulated ones.

    Raises `CheckpointError` for a damaged file.
    """
    path = directory / "model" / _MODEL
    return read_model(path) if path.is_file() else None


def keep_participation(directory: Path, section: Method, model: ParticipationModel) -> None:
    """Write the probabilities of ``model`` if they follow from the clients' data."""
    if depends_on_data(section):
        document = {"probabilities": model.probabilities.tolist()}
        write_atomically(directory / _PROBABILITIES, json.dumps(document) + "\n")


def read_participation(
    directory: Path, section: Method, num_clients: int, seed: int
) -> ParticipationModel | None:
    """Return the model of ``section`` without the clients' data; None when those are needed and not kept."""
    options: dict[str, Any] = dict(section.options)
    if depends_on_data(section):
        path = directory / _PROBABILITIES
        if not path.is_file():
            return None
        options["probabilities"] = json.loads(path.read_text(encoding="utf-8"))["probabilities"]
        options["allow_zero"] = True  # Clients without data.
    clients: Clients = _Counted(num_clients)
    return build_participation(Method(name=section.name, options=options), clients, seed)


class _Counted:
    """Clients of which only the number is known."""

    def __init__(self, num_clients: int) -> None:
        self.num_clients = num_clients

    def label_distribution(self) -> NDArray:
        """Never asked for: `read_participation` looks first whether it would be."""
        raise NotImplementedError
