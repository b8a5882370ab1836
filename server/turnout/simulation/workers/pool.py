"""The pool: forks workers, hands them jobs, collects answers, replaces a worker that died."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import time
import traceback
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Final

import numpy as np

from turnout.simulation.workers.heap import SharedHeap
from turnout.simulation.workers.parcels import Entry, Parcels, owner
from turnout.wire.errors import ConfigError

_log = logging.getLogger(__name__)

# A second job waits at each worker, so that it never waits for the folding.
_QUEUED: Final = 2
_MOST_DEATHS: Final = 5
_MOST_STARTS: Final = 3
_START_SECONDS: Final = 10.0
_INLINE_BYTES: Final = 32 << 10
_OTHER_FILES: Final = 64  # Of the rest of the program.

Answer = dict[str, Any]
Handler = Callable[[dict[str, Any]], Answer]


def can_fork() -> bool:
    """Return whether this system has ``fork`` and anonymous files in memory, that is, is Linux."""
    return hasattr(os, "memfd_create") and hasattr(os, "fork")


def _check_files(workers: int) -> None:
    """Raise `ConfigError` unless this process may open a heap and a link for each worker."""
    import resource  # Where there is fork, there is this.

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and 2 * workers + _OTHER_FILES > limit:
        raise ConfigError(
            f"workers={workers} need two open files each, and this process may have {limit}; use at most "
            f"{max(1, (limit - _OTHER_FILES) // 2)} workers, or raise the limit (ulimit -n)."
        )


class WorkersDoNotStartError(RuntimeError):
    """No worker could be forked here: what other threads of this process do makes its children hang."""


class Job(ABC):
    """One piece of work for one worker; a subclass says what is sent and what the answer means."""

    nodes: tuple[int, ...]
    """The clients that it runs: a client does one thing at a time."""

    @abstractmethod
    def command(self) -> dict[str, Any]:
        """Return what to send, made when the worker is about to get it."""

    @abstractmethod
    def finish(self, answer: Answer, *, late: bool) -> Any:
        """Take in the answer and return the result; ``late``: nobody waits for the result any more."""

    def drop(self, result: Any) -> None:
        """Let go of a result that nobody took."""

    @abstractmethod
    def lost(self, reason: str) -> Any:
        """Return the result of a job whose worker died."""


@dataclass(eq=False)
class _Worker:
    pid: int
    link: Connection
    jobs: deque[Job] = field(default_factory=deque)
    releases: list[Entry] = field(default_factory=list)


class WorkerPool:
    """``size`` forked processes. Each runs the handler that ``make_handler(parcels)`` returns, in the child.

    Raises `ConfigError` where `can_fork` is false.
    """

    def __init__(self, size: int, make_handler: Callable[[Parcels], Handler]) -> None:
        if not can_fork():
            raise ConfigError(
                f"executor 'processes' needs Linux, this is {sys.platform!r}; use executor='threads'."
            )
        _check_files(size)
        self.size = size
        self._make_handler = make_handler
        self._heaps = [SharedHeap(number) for number in range(size + 1)]
        self.parcels = Parcels(self._heaps[-1], self._heaps)
        self._workers: list[_Worker] = []
        self._late: dict[int, Job] = {}
        self._retired: list[Entry] = []
        self._deaths = 0
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def start(self) -> None:
        """Fork the workers that there should be.

        Raises `WorkersDoNotStartError` if one hangs at its start every time; none of them is left then.
        """
        if self._workers:
            return
        try:
            for number in range(self.size):
                self._workers.append(self._fork(number))
        except WorkersDoNotStartError:
            _end(self._workers)
            self._workers.clear()
            raise
        self._finalizer = weakref.finalize(self, _stop, self._workers, self._heaps)

    # Jobs.

    def run(
        self, jobs: Iterable[Job], *, deadline: float | None, ordered: bool
    ) -> Generator[Any, None, None]:
        """Yield the jobs' results, as they come or in the order of the jobs.

        What completes after ``deadline`` (on `time.monotonic`'s clock), or after the generator was closed, is
        taken in but not yielded.
        """
        self.start()
        source = iter(jobs)
        window: dict[Job, list[Any]] = {}  # In order; a done job holds its result.
        try:
            while self._fill(window, source, deadline) and window:
                job = _finished(window, ordered)
                if job is not None:
                    yield window.pop(job)[0]
                elif not self._collect(window, deadline):
                    break
            while (job := _finished(window, ordered=False)) is not None:  # Done, but behind a late one.
                yield window.pop(job)[0]
        finally:
            for job, result in window.items():
                if result:
                    job.drop(result[0])
                else:
                    self._late.update(dict.fromkeys(job.nodes, job))

    def settle(self) -> None:
        """Wait until no worker has a job."""
        while any(worker.jobs for worker in self._workers):
            self._collect({}, None)

    def release(self, entry: Entry) -> None:
        """Tell the block's owner, with the next job, that nobody reads it any more."""
        number = owner(entry)
        if number == self.size:
            self.parcels.release(entry)
        else:
            self._workers[number].releases.append(entry)

    def release_when_settled(self, entries: list[Entry]) -> None:
        """Release blocks of this process as soon as no worker runs a job of an earlier exchange."""
        self._retired += entries
        self._release_retired()

    def _release_retired(self) -> None:
        if not self._late:
            for entry in self._retired:
                self.release(entry)
            self._retired = []

    def _fill(self, window: dict[Job, list[Any]], source: Iterator[Job], deadline: float | None) -> bool:
        """Dispatch jobs until the workers have enough; False when the deadline passes first."""
        while len(window) < _QUEUED * self.size and (job := next(source, None)) is not None:
            if not self._free(job.nodes, deadline):
                return False
            window[job] = []
            self._dispatch(job)
        return True

    def _free(self, nodes: tuple[int, ...], deadline: float | None) -> bool:
        """Wait until none of ``nodes`` still runs for an earlier exchange; False if the deadline passes."""
        while self._late and any(node in self._late for node in nodes):
            if not self._collect({}, deadline):
                return False
        return deadline is None or time.monotonic() <= deadline

    def _dispatch(self, job: Job) -> None:
        worker = min(self._workers, key=_waiting)
        command = {**job.command(), "release": worker.releases}
        worker.releases = []
        worker.jobs.append(job)
        with suppress(OSError):  # It died: `_collect` finds out.
            send(worker.link, self.parcels, command)

    def _collect(self, window: dict[Job, list[Any]], deadline: float | None) -> bool:
        """Take in at least one answer; False when the deadline passes first."""
        links = {worker.link: worker for worker in self._workers if worker.jobs}
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(list(links), timeout)
        for link in ready:
            worker = links[link]  # type: ignore[index]
            try:
                answer = receive(worker.link, self.parcels)
            except (EOFError, OSError):
                self._replace(worker, window)
                continue
            if "fault" in answer:
                raise RuntimeError(f"a worker process failed outside any client:\n{answer['fault']}")
            job = worker.jobs.popleft()
            for entry in answer.pop("release", ()):
                self.release(entry)
            self._book(job, window, job.finish(answer, late=job not in window))
        return bool(ready) and (deadline is None or time.monotonic() <= deadline)

    def _book(self, job: Job, window: dict[Job, list[Any]], result: Any) -> None:
        if job in window:
            window[job].append(result)
        for node in job.nodes:
            if self._late.get(node) is job:
                del self._late[node]
                self._release_retired()

    # Processes.

    def _fork(self, number: int) -> _Worker:
        """Start a worker, and again if it hangs: a library's lock that another thread held stays locked."""
        for _ in range(_MOST_STARTS):
            worker = self._forked(number)
            with suppress(EOFError, OSError):
                if worker.link.poll(_START_SECONDS):
                    receive(worker.link, self.parcels)
                    return worker
            _log.warning("worker process %d did not start; trying again", number)
            worker.link.close()
            os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)
        raise WorkersDoNotStartError(f"worker process {number} did not start in {_MOST_STARTS} attempts")

    def _forked(self, number: int) -> _Worker:
        ours, theirs = Pipe()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # Or the child would write once more what waits there.
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _serve(theirs, self._heaps, number, self._make_handler)
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        return _Worker(pid, ours)

    def _replace(self, worker: _Worker, window: dict[Job, list[Any]]) -> None:
        """Give up a dead worker's jobs and start another in its place; what it had written stays readable."""
        number = self._workers.index(worker)
        code = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        self._deaths += 1
        reason = (
            f"worker process {number} was ended {how}; if the system ran out of memory, use fewer workers."
        )
        _log.error("%s", reason)
        for job in worker.jobs:
            self._book(job, window, job.lost(reason))
        worker.link.close()
        if self._deaths > _MOST_DEATHS:
            raise RuntimeError(f"{reason} That was the {self._deaths}th time.")
        # What the dead one wrote lives on in states; the new one writes behind it.
        self._workers[number] = self._fork(number)


def _waiting(worker: _Worker) -> int:
    """Return how many clients a worker has yet to run, the present job's included."""
    return sum(len(job.nodes) for job in worker.jobs)


def _finished(window: dict[Job, list[Any]], ordered: bool) -> Job | None:
    """Return a job whose result may be handed over now."""
    if ordered:
        head = next(iter(window))
        return head if window[head] else None
    return next((job for job, result in window.items() if result), None)


def send(link: Connection, parcels: Parcels, message: dict[str, Any]) -> None:
    """Send a JSON-able message; a long one through the heap, so that two senders cannot block each other."""
    data = json.dumps(message).encode()
    if len(data) > _INLINE_BYTES:
        entry = parcels.put(np.frombuffer(data, np.uint8))
        data = json.dumps({"long": entry}).encode()
    link.send_bytes(data)


def receive(link: Connection, parcels: Parcels) -> dict[str, Any]:
    """Return the next message. A long one's block is released with the next message back."""
    message: dict[str, Any] = json.loads(link.recv_bytes())
    if "long" in message:
        entry = message["long"]
        message = json.loads(parcels.get(entry).tobytes())
        message.setdefault("release", []).append(entry)
    return message


def _serve(
    link: Connection, heaps: list[SharedHeap], number: int, make_handler: Callable[[Parcels], Handler]
) -> None:
    """Run in the child: answer commands until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent decides how a run ends.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Locks and databases are the parent's. An open end of another link would hide that the parent is gone.
    _close_files({link.fileno(), *(heap.fileno() for heap in heaps)})
    gc.freeze()  # What is shared with the parent is not gone through, and so not copied.
    heaps[number].adopt()
    parcels = Parcels(heaps[number], heaps)
    handler = make_handler(parcels)
    send(link, parcels, {"ready": number})
    while True:
        try:
            command = receive(link, parcels)
        except (EOFError, OSError):
            return
        foreign = []
        for entry in command.pop("release"):
            if owner(entry) == number:
                parcels.release(entry)
            else:
                foreign.append(entry)
        try:
            answer = {**handler(command), "release": foreign}
        except BaseException:
            answer = {"fault": traceback.format_exc()}
        try:
            send(link, parcels, answer)
        except OSError:
            return


def _close_files(kept: set[int]) -> None:
    """Close every inherited file but the standard streams and those ``kept``."""
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor > 2 and descriptor not in kept:
            with suppress(OSError):  # The one of the listing itself is closed already.
                os.close(descriptor)


def _stop(workers: list[_Worker], heaps: list[SharedHeap]) -> None:
    _end(workers)
    for heap in heaps:
        heap.close()


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.link.close()
    patience = time.monotonic() + 1.0
    for worker in workers:
        with suppress(ChildProcessError):
            while os.waitpid(worker.pid, os.WNOHANG) == (0, 0):
                if time.monotonic() > patience:
                    os.kill(worker.pid, signal.SIGKILL)
                    os.waitpid(worker.pid, 0)
                    break
                time.sleep(0.005)
