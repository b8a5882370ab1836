"""What a client keeps between rounds, inside Flower's ``Context.state`` so that any engine can persist it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from flwr.app import ArrayRecord, MetricRecord, RecordDict

from turnout.tasks.task import Vector
from turnout.wire.arrays import as_array, view
from turnout.wire.errors import ConfigError

_PREFIX: Final = "turnout"
_ROUND: Final = "round"


class ClientState:
    """Named vectors and the round they were saved in, of one local update of one client.

    Each local update has its own namespace, so that a client may serve several strategies. A request
    of round 1 starts a run: what an earlier run left is not read.
    """

    def __init__(self, records: RecordDict, local_update: str, server_round: int) -> None:
        self._records = records
        self._vectors_key = f"{_PREFIX}.{local_update}.vectors"
        self._numbers_key = f"{_PREFIX}.{local_update}.numbers"
        self._server_round = server_round

    @property
    def last_round(self) -> int | None:
        """The round of the last `save`, None before the first one (of this run)."""
        if self._server_round <= 1 or self._numbers_key not in self._records:
            return None
        last = self._records[self._numbers_key][_ROUND]
        if not isinstance(last, (int, float)):
            raise ConfigError(
                f"client state {self._numbers_key!r} holds {last!r} as round; clear the client's state."
            )
        return int(last)

    def load(self, size: int) -> dict[str, Vector]:
        """Return the saved vectors by name, read-only; empty before the first `save` (of this run).

        Raises `ConfigError` when they are of another model, that is, not of ``size`` numbers.
        """
        if self.last_round is None:
            return {}
        record = self._records[self._vectors_key]
        if not isinstance(record, ArrayRecord):
            raise ConfigError(
                f"client state {self._vectors_key!r} holds no arrays; clear the client's state."
            )
        vectors = {name: view(array) for name, array in record.items()}
        for name, vector in vectors.items():
            if vector.shape != (size,):
                raise ConfigError(
                    f"client state {name!r} has shape {vector.shape} but the model has {size} parameters; "
                    "clear the state of the client, it is of another run."
                )
        return vectors

    def number(self, name: str) -> float:
        """Return a number that was saved with the vectors; `ConfigError` when there is none."""
        value = self._records[self._numbers_key].get(name)
        if not isinstance(value, (int, float)):
            raise ConfigError(
                f"client state {self._numbers_key!r} holds {value!r} as {name}; clear the client's state."
            )
        return value

    def save(self, vectors: Mapping[str, Vector], **numbers: float) -> None:
        """Replace what is saved; vectors are not copied, so the caller must not change them afterwards."""
        record = ArrayRecord()  # Filled by assignment: its constructor would copy the arrays.
        for name, vector in vectors.items():
            record[name] = as_array(vector)
        self._records[self._vectors_key] = record
        self._records[self._numbers_key] = MetricRecord({**numbers, _ROUND: self._server_round})
