"""One stream of a node: who speaks on it, what waits to be sent, what it has been sent already."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from turnout.v1 import fleet_pb2 as pb
from turnout.wire.framing import encode_offer
from turnout.wire.outbox import Outbox
from turnout.wire.work import EncodedWork, Payload

_FAREWELL_SECONDS: Final = 2.0


class Connection:
    """The server's end of one stream; used on the event loop only."""

    def __init__(self, name: str, ids: Sequence[int], peer: str) -> None:
        self.name = name
        self.ids = tuple(ids)
        self.peer = peer
        self.outbox = Outbox()
        self.closing = False
        self.reading = True
        self._clients = frozenset(ids)
        self._payloads: set[int] = set()
        self._handler = asyncio.current_task()

    def speaks_for(self, client: int) -> bool:
        """Return whether ``client`` is one of this stream's logical clients."""
        return client in self._clients

    def send(self, **body: object) -> None:
        """Send a short message, such as ``ack=pb.Ack(...)``."""
        self.outbox.send(pb.ServerMessage(**body).SerializeToString())  # type: ignore[arg-type]

    def send_later(self, **body: object) -> None:
        """Send a short message with the next one, or after ``outbox.flush()``."""
        self.outbox.send_later(pb.ServerMessage(**body).SerializeToString())  # type: ignore[arg-type]

    def offer(self, task: pb.TaskOffer, work: EncodedWork) -> int:
        """Send an offer and those of its payloads that this stream has not had; return the bytes."""
        # Before its payloads, which are longer.
        self.outbox.send(encode_offer(task, work.head))
        sent = len(work.head)
        for payload in work.payloads:
            if payload.id not in self._payloads:
                self._payloads.add(payload.id)
                self.outbox.stream(payload.unless_retired())
                sent += payload.size
        return sent

    def release(self, payloads: Sequence[Payload]) -> None:
        """Tell the node that ``payloads`` are needed no more."""
        ids = [payload.id for payload in payloads if payload.id in self._payloads]
        if ids:
            self._payloads.difference_update(ids)
            self.send(release=pb.Release(payloads=ids))

    def close(self, **body: object) -> None:
        """Send a last message and end the stream."""
        if not self.closing:
            self.closing = True
            self.send(**body)
            self.outbox.close()
            # A peer that reads nothing would keep what it was told, and its stream, for ever.
            asyncio.get_running_loop().call_later(_FAREWELL_SECONDS, self.stop_handler)

    def stop_handler(self) -> None:
        """End the coroutine that reads this stream, once everything is written."""
        if self.reading and self._handler is not None:
            self._handler.cancel()
