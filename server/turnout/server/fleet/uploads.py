"""Upload slots: how many replies are received at once, in which order, and what ends a stalled one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from turnout.server.fleet.options import FleetOptions
from turnout.server.fleet.staging import Receipt
from turnout.server.fleet.tasks import Stage, Task
from turnout.wire.buffer_pool import BufferPool
from turnout.wire.framing import Chunk


class UploadSlots:
    """Grants at most ``options.upload_slots`` uploads; a slot is free again when its reply has been folded.

    ``grant`` tells the client to send, ``stalled`` is called for an upload that fell below the minimum rate.
    """

    def __init__(
        self, options: FleetOptions, *, grant: Callable[[Task], None], stalled: Callable[[Task], None]
    ) -> None:
        self._options = options
        self._grant = grant
        self._stalled = stalled
        self._waiting: deque[Task] = deque()
        # When each upload began, and the timer that watches it.
        self._active: dict[Task, tuple[float, asyncio.TimerHandle]] = {}
        self.pool = BufferPool(options.upload_slots)

    @property
    def busy(self) -> int:
        """Slots in use."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Replies that are ready and have no slot yet."""
        return len(self._waiting)

    def enqueue(self, task: Task) -> None:
        """Let ``task``, whose head has been checked, wait for a slot."""
        task.stage = Stage.WAITING
        self._waiting.append(task)
        self._fill()

    def receive(self, task: Task, chunk: Chunk) -> bool:
        """Store a chunk; return whether the reply is complete. Raises `ReplyRejected`."""
        assert task.receipt is not None
        return task.receipt.add(chunk)

    def free(self, task: Task) -> None:
        """Take back the slot or the place in the queue that ``task`` has, if any."""
        if task in self._active:
            self._active.pop(task)[1].cancel()
            if task.receipt is not None:
                self.pool.give(task.receipt)
                task.receipt = None
            self._fill()
        elif task.stage is Stage.WAITING:
            self._waiting.remove(task)

    def _fill(self) -> None:
        while self._waiting and len(self._active) < self._options.upload_slots:
            task = self._waiting.popleft()
            plan, ready = task.plan, task.ready
            assert plan is not None
            assert ready is not None
            loop = asyncio.get_running_loop()
            task.receipt = Receipt(self.pool.take(plan.size), plan.size, ready.checksum, plan.runs())
            task.stage = Stage.RECEIVING
            watch = loop.call_later(self._options.stall, self._watch, task, task.receipt)
            self._active[task] = (loop.time(), watch)
            self._grant(task)

    def _watch(self, task: Task, receipt: Receipt) -> None:
        """Free the slot of an upload below the minimum rate, else look again later."""
        if task.receipt is not receipt or task.stage is not Stage.RECEIVING:
            return
        loop = asyncio.get_running_loop()
        began = self._active[task][0]
        counted = loop.time() - began - self._options.stall
        # Within the grace an upload must at least have begun.
        if receipt.received <= self._options.min_rate * counted or receipt.received == 0:
            self._stalled(task)
        else:
            watch = loop.call_later(self._options.stall / 4, self._watch, task, receipt)
            self._active[task] = (began, watch)
