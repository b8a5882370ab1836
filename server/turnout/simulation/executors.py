"""How the clients of one exchange are run in this process: one after the other, or on threads.

An executor is one method, `Executor.run`; another way of running clients is another subclass in `EXECUTORS`.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable
from queue import Empty, SimpleQueue
from typing import Final

from flwr.app import Message

from turnout.wire.errors import ConfigError, unknown_name

Deliver = Callable[[Message], Message]
"""Hands a request to its client and returns the reply; a failing client gives an error reply."""


class Executor(ABC):
    """Runs clients and hands over their replies while holding only a bounded number of them."""

    @abstractmethod
    def run(
        self, requests: Iterable[Message], deliver: Deliver, *, deadline: float | None, ordered: bool
    ) -> Generator[Message, None, None]:
        """Yield one reply per request: in the order of the requests if ``ordered``, else as they complete.

        Nothing that completes after ``deadline`` (on the clock of `time.monotonic`) is yielded, and clients
        not started by then are not started. Closing the generator has the same effect.
        """

    @abstractmethod
    def settle(self) -> None:
        """Wait until no client is running, those whose reply came too late included."""


class SerialExecutor(Executor):
    """One client at a time, in the order of the requests; one reply exists at a time."""

    def run(
        self, requests: Iterable[Message], deliver: Deliver, *, deadline: float | None, ordered: bool
    ) -> Generator[Message, None, None]:
        """Yield the replies in the order of the requests."""
        for request in requests:
            if deadline is None:
                yield deliver(request)
                continue
            if time.monotonic() > deadline:
                return
            reply = deliver(request)
            if time.monotonic() > deadline:
                return
            yield reply
            del reply  # It must not live on while the next client runs.

    def settle(self) -> None:
        """Return at once: a client runs only while a reply is waited for."""


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

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._unfinished: dict[int, _Job] = {}

    def run(
        self, requests: Iterable[Message], deliver: Deliver, *, deadline: float | None, ordered: bool
    ) -> Generator[Message, None, None]:
        """Yield replies as they complete, or in the order of the requests."""
        self._start_threads()
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
        weakref.finalize(self, _stop, self._jobs, self.workers)


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


def _stop(jobs: SimpleQueue[_Job | None], workers: int) -> None:
    for _ in range(workers):
        jobs.put(None)


def _serial(workers: int | None) -> Executor:
    return SerialExecutor()


def _threads(workers: int | None) -> Executor:
    return ThreadsExecutor(workers or os.cpu_count() or 1)


EXECUTORS: Final[dict[str, Callable[[int | None], Executor]]] = {"serial": _serial, "threads": _threads}
"""What ``LocalGrid(executor=...)`` can name: how clients are run."""


def make_executor(name: str, workers: int | None = None) -> Executor:
    """Return the executor called ``name`` (``"serial"`` or ``"threads"``).

    ``workers`` is how many clients run at once; None means one per CPU, and ``"serial"`` always runs one.
    Raises `ConfigError` for an unknown name or fewer than one worker.
    """
    if name not in EXECUTORS:
        raise unknown_name("executor", name, EXECUTORS)
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise ConfigError(
            f"workers must be an integer of at least 1, or None for one per CPU, got {workers!r}."
        )
    return EXECUTORS[name](workers)
