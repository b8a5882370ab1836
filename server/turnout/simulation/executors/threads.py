"""Clients on threads of this process."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Final

from flwr.app import Message

from turnout.simulation.clients import LocalClients
from turnout.simulation.executors.base import Executor

# Seconds that threads which are still busy are waited for at the end.
_FAREWELL: Final = 0.5

Deliver = Callable[[Message], Message]
"""Hands a request to its client and returns the reply; a failing client gives an error reply."""


class _Job:
    """One request on its way through the worker threads."""

    __slots__ = (
        "cancelled", "completed_at", "deliver", "done", "failure", "finished", "previous", "reply", "request",
    )  # fmt: skip

    def __init__(
        self, request: Message, deliver: Deliver, finished: SimpleQueue[_Job], previous: _Job | None
    ) -> None:
        self.request = request
        self.deliver = deliver
        self.finished = finished
        self.previous = previous
        self.reply: Message | None = None
        self.failure: BaseException | None = None
        self.completed_at = 0.0
        self.cancelled = False
        self.done = threading.Event()

    def work(self) -> None:
        """Run on a worker thread."""
        if self.previous is not None:
            # A client does one thing at a time: its last request may still run after its deadline.
            self.previous.done.wait()
            self.previous = None
        try:
            reply = None if self.cancelled else self.deliver(self.request)
            self.reply = None if self.cancelled else reply
        except (
            BaseException
        ) as error:  # Not the client's: the server's thread must see it, not wait for ever.
            self.failure = error
        self.completed_at = time.monotonic()
        self.done.set()
        self.finished.put(self)

    def take(self, deadline: float | None) -> Message | None:
        """Hand over the reply, keeping none; None if it came after the deadline."""
        if self.failure is not None:
            raise self.failure
        reply, self.reply = self.reply, None
        return None if deadline is not None and self.completed_at > deadline else reply


class ThreadsExecutor(Executor):
    """Up to ``workers`` clients at a time on as many threads, which live as long as the executor.

    At most ``2 * workers`` requests are on their way or answered and not yet taken, so that the workers
    stay busy while a reply is folded and memory stays bounded. The threads are daemons: a client that never
    returns does not keep the process from ending.
    """

    def __init__(self, clients: LocalClients, workers: int) -> None:
        super().__init__(clients)
        self.workers = workers
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._unfinished: dict[int, _Job] = {}

    def run(
        self, requests: Iterable[Message], *, server_round: int, deadline: float | None, ordered: bool
    ) -> Generator[Message, None, None]:
        """Yield replies as they complete, or in the order of the requests."""
        self._start_threads()
        deliver = partial(self.clients.deliver, server_round=server_round)
        waiting = iter(requests)
        window: dict[_Job, None] = {}  # In order of submission.
        finished: SimpleQueue[_Job] = SimpleQueue()
        try:
            while True:
                while len(window) < 2 * self.workers and (request := next(waiting, None)) is not None:
                    window[self._submit(request, deliver, finished)] = None
                if not window:
                    return
                job = _next_job(window, finished, deadline, ordered)
                if job is None:
                    break
                del window[job]
                if (reply := job.take(deadline)) is not None:
                    del job
                    yield reply
                    del reply
            for job in [job for job in window if job.done.is_set()]:  # In order, but behind a late one.
                del window[job]
                if (reply := job.take(deadline)) is not None:
                    yield reply
                    del reply
        finally:
            for job in window:
                job.cancelled = True
            self._unfinished = {node: job for node, job in self._unfinished.items() if not job.done.is_set()}

    def settle(self) -> None:
        """Wait until no client is running."""
        for job in self._unfinished.values():
            job.done.wait()
        self._unfinished.clear()

    def _submit(self, request: Message, deliver: Deliver, finished: SimpleQueue[_Job]) -> _Job:
        node = request.metadata.dst_node_id
        previous = self._unfinished.get(node)
        if previous is not None and previous.done.is_set():
            previous = None
        job = self._unfinished[node] = _Job(request, deliver, finished, previous)
        self._jobs.put(job)
        return job

    def _start_threads(self) -> None:
        if self._threads:
            return
        self._threads = [
            threading.Thread(target=_work, args=(self._jobs,), name=f"turnout-client-{i}", daemon=True)
            for i in range(self.workers)
        ]
        for thread in self._threads:
            thread.start()
        weakref.finalize(self, _stop, self._jobs, self._threads)


def _next_job(
    window: dict[_Job, None], finished: SimpleQueue[_Job], deadline: float | None, ordered: bool
) -> _Job | None:
    """Wait for the job whose reply comes next; None when the deadline passes first."""
    while True:
        if ordered and (head := next(iter(window))).done.is_set():
            return head
        try:
            job = finished.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except Empty:
            return None
        if not ordered:
            return job


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.work()
        del job  # What it holds must not live on until the next job comes.


def _stop(jobs: SimpleQueue[_Job | None], threads: list[threading.Thread]) -> None:
    """Let the threads go, idle ones at once: PyTorch aborts in a thread that outlives the interpreter."""
    for _ in threads:
        jobs.put(None)
    until = time.monotonic() + _FAREWELL
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, until - time.monotonic()))
