"""What can be observed of a node while it works."""

from __future__ import annotations


class NodeWatch:
    """Observes a node; override what you need. Called on the node's event loop: be quick, raise nothing."""

    def connected(self, clients: int) -> None:
        """Run when the server has welcomed the node with so many ``clients``; with 0 when the stream ends."""

    def traffic(self, *, sent: int = 0, received: int = 0) -> None:
        """Run for each message, with its bytes."""

    def worked(self, seconds: float, *, trained: bool, examples: int, failed: bool) -> None:
        """Run when a client has finished a task; ``examples`` are those it trained on, 0 when unknown."""

    def settled(self, outcome: str) -> None:
        """Run when a task is over: accepted, late, duplicate, rejected, failed or cancelled."""
