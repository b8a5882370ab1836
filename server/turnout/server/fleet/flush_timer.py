"""A timer that is set many times and fires at the earliest moment asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class FlushTimer:
    """Calls ``flush`` once within the shortest of the times that were asked for since its last call."""

    def __init__(self, flush: Callable[[], None]) -> None:
        self._flush = flush
        self._handle: asyncio.TimerHandle | None = None

    def within(self, seconds: float) -> None:
        """Flush after ``seconds`` at the latest."""
        loop = asyncio.get_running_loop()
        if self._handle is None or self._handle.when() > loop.time() + seconds:
            if self._handle is not None:
                self._handle.cancel()
            self._handle = loop.call_later(seconds, self._fire)

    def _fire(self) -> None:
        self._handle = None
        self._flush()
