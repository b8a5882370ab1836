"""What every engine of ours has in common as a Flower ``Grid``."""

from __future__ import annotations

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from turnout.wire.flower import Run, ensure_identity, local_run, request


class LocalRunGrid(Grid):
    """A ``Grid`` of a run that no SuperLink manages: it makes its messages itself."""

    def __init__(self) -> None:
        self._run = local_run()
        ensure_identity()

    def set_run(self, run: Run) -> None:
        """Set the run that this grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that this grid operates in."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message from the server to ``dst_node_id``; ``ttl`` is in seconds."""
        message = request(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id)
        if ttl is not None:
            message.metadata.ttl = ttl
        return message
