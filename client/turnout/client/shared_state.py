"""What the server fixes for all clients beside the model (indices of adapters), on the client's side."""

from __future__ import annotations

from typing import Final

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict

from turnout.client.flat_model import FlatModel
from turnout.peft import Adapted
from turnout.wire import keys
from turnout.wire.arrays import NDArray, view
from turnout.wire.digests import shared_digest
from turnout.wire.errors import ConfigError

_KEPT: Final = "turnout.shared"
_MOST_KNOWN: Final = 2  # The state in force, and the one before it for a model that is still to change.


class SharedStates:
    """The states that came to this process, by digest."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, NDArray]] = {}

    def apply(self, content: RecordDict, context: Context, model: FlatModel) -> None:
        """Bring ``model`` to the state that the request names, if it names one.

        Its content is in the request, was in an earlier one, or is kept in the client's state. Raises
        `ConfigError` when it is nowhere (the server then sends it again), is not what its digest says, or
        does not fit the model.
        """
        config = content.get(keys.CONFIG)
        if not isinstance(config, ConfigRecord):
            return
        digest, given = config.get(keys.SHARED_DIGEST), content.get(keys.SHARED)
        if not isinstance(digest, str):
            return
        keep = bool(config.get(keys.KEEP_SHARED)) and isinstance(given, ArrayRecord)
        if digest not in self._known or keep:
            self._learn(digest, given if isinstance(given, ArrayRecord) else context.state.get(_KEPT))
        if keep and given is not None:
            context.state[_KEPT] = given
        if model.shared_digest != digest:
            state = {name: torch.tensor(array) for name, array in self._known[digest].items()}
            Adapted.of(model.module).load_shared_state(state)
            model.shared_digest = digest

    def _learn(self, digest: str, record: object) -> None:
        arrays = (
            {name: view(array) for name, array in record.items()} if isinstance(record, ArrayRecord) else {}
        )
        if shared_digest(arrays) != digest:
            held = "another one" if arrays else "none"
            raise ConfigError(
                f"the request is about the shared state {digest}, and this client has {held}; the server "
                "must send it along."
            )
        while len(self._known) >= _MOST_KNOWN:
            self._known.pop(next(iter(self._known)))
        self._known[digest] = arrays
