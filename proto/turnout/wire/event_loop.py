"""The event loop that both ends run on."""

from __future__ import annotations

import asyncio
import contextlib


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return uvloop's event loop where it is installed: half the latency with many streams."""
    with contextlib.suppress(ImportError):
        import uvloop

        loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        return loop
    return asyncio.new_event_loop()
