"""What the server fixes for all clients beside the model: indices and masks of adapters, handed out once.

A request names the state by its digest; its content comes along until the client is known to have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from turnout.wire import CheckpointError, NDArray, as_array, keys, shared_digest

if TYPE_CHECKING:
    from turnout.strategies.streaming import StreamingStrategy


class Source:
    """Where a shared state comes from; a run's adapters have one, see `turnout.experiment.adapters`."""

    def begin(self) -> Mapping[str, NDArray]:
        """Return the state that a run starts with."""
        raise NotImplementedError

    def resume(self, arrays: Mapping[str, NDArray]) -> None:
        """Take over the state that a checkpoint holds."""

    def end_round(
        self, server_round: int, model: ArrayRecord
    ) -> tuple[ArrayRecord, Mapping[str, NDArray]] | None:
        """Return the model and the state that replace the present ones after this round, None to go on."""
        return None


class SharedState:
    """The state in force, and which nodes have it. False while there is none."""

    def __init__(self) -> None:
        self.source: Source | None = None
        self.arrays: dict[str, NDArray] = {}
        self.digest = ""
        self._holders: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self.arrays)

    def begin(self) -> None:
        """Start a run."""
        self.set(self.source.begin() if self.source is not None else {})

    def set(self, arrays: Mapping[str, NDArray]) -> None:
        """Put ``arrays`` in force; no node has them yet."""
        self.arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        self.digest = shared_digest(self.arrays) if self.arrays else ""
        self._holders.clear()

    def attached(self, contents: Mapping[int, RecordDict], *, always: bool) -> dict[int, RecordDict]:
        """Return requests' contents by node with the digest and, where it is needed, the state.

        ``always`` sends it to all; else clients are asked to keep it, and those that have it get the digest
        only.
        """
        if not self:
            return dict(contents)
        record = ArrayRecord()
        for name, array in self.arrays.items():
            record[name] = as_array(array)
        made: dict[tuple[int, bool], RecordDict] = {}
        attached = {}
        for node, content in contents.items():
            needed = always or node not in self._holders
            key = (id(content), needed)
            if key not in made:
                made[key] = self._extended(content, record if needed else None, keep=not always)
            attached[node] = made[key]
        return attached

    def received(self, node: int) -> None:
        """Note that ``node`` answered a request with the state in force."""
        self._holders.add(node)

    def failed(self, node: int) -> None:
        """Note that ``node`` failed, maybe since it lost the state."""
        self._holders.discard(node)

    def end_round(self, strategy: StreamingStrategy, server_round: int) -> None:
        """Let the source replace the state, and the model with it."""
        if self.source is None:
            return
        replaced = self.source.end_round(server_round, strategy.arrays())
        if replaced is not None:
            model, arrays = replaced
            strategy.x = strategy.coordinates.inside(strategy.layout.flatten(model)).copy()
            self.set(arrays)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in force, for a checkpoint."""
        return dict(self.arrays)

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Put a checkpoint's state in force. Raises `CheckpointError` where only one of the two has any."""
        if bool(tree) is not bool(self):
            raise CheckpointError("checkpoint and run differ in whether adapters share a state.")
        if tree:
            self.set(tree)
            if self.source is not None:
                self.source.resume(self.arrays)

    def _extended(self, content: RecordDict, record: ArrayRecord | None, *, keep: bool) -> RecordDict:
        extended = RecordDict(dict(content.items()))
        config = content[keys.CONFIG]
        assert isinstance(config, ConfigRecord)
        extended[keys.CONFIG] = ConfigRecord(
            {**config, keys.SHARED_DIGEST: self.digest, keys.KEEP_SHARED: keep}
        )
        if record is not None:
            extended[keys.SHARED] = record
        return extended
