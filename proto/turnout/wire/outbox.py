"""What one end of a stream has yet to send: short messages first, long payloads behind them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Final

from turnout.wire.framing import join_frames

_BATCH_BYTES: Final = 256 << 10


class Outbox:
    """Frames that wait for their stream; one task writes them, anyone on the event loop adds.

    A short message overtakes payloads that are under way. Short messages that wait together go as one frame:
    a frame costs the event loop more than a message.
    """

    __slots__ = ("_closed", "_long", "_short", "_waiter")

    def __init__(self) -> None:
        # A server has thousands of these: one deque each, and no Event, whose waiters are another.
        self._short: deque[bytes] = deque()
        self._long: list[Iterator[bytes]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """Short messages that wait."""
        return len(self._short)

    def send(self, frame: bytes) -> None:
        """Send one frame before all payloads."""
        self._short.append(frame)
        self.flush()

    def send_later(self, frame: bytes) -> None:
        """Send one frame with the next one, or after `flush`."""
        self._short.append(frame)

    def flush(self) -> None:
        """Send what waits."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def stream(self, frames: Iterable[bytes]) -> None:
        """Send ``frames`` behind the payloads that wait already; they are made one by one."""
        self._long.append(iter(frames))
        self.flush()

    def close(self) -> None:
        """End `run` once the short messages are sent; payloads are given up."""
        self._closed = True
        self.flush()

    async def run(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Write frames as they come until `close`, never faster than the peer reads."""
        while True:
            frame = self._next()
            if frame is not None:
                await write(frame)
            elif self._closed:
                return
            else:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
                self._waiter = None

    def _next(self) -> bytes | None:
        if self._short:
            return self._joined()
        if self._closed:
            self._long.clear()
        while self._long:
            frame = next(self._long[0], None)
            if frame is not None:
                return frame
            del self._long[0]
        return None

    def _joined(self) -> bytes:
        """Return the next short message, with those behind it as far as they fit one frame."""
        frame = self._short.popleft()
        if not self._short or len(frame) > _BATCH_BYTES:
            return frame
        frames, size = [frame], len(frame)
        while self._short and size + len(self._short[0]) <= _BATCH_BYTES:
            size += len(self._short[0])
            frames.append(self._short.popleft())
        return join_frames(frames) if len(frames) > 1 else frame
