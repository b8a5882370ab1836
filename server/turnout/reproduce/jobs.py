"""Runs the independent parts of a study on several processor cores."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from turnout.reproduce.report import Progress
from turnout.wire import TurnoutError

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    what: str,
    progress: Progress | None = None,
    workers: int | None = None,
) -> list[Result]:
    """Return ``[function(job) for job in jobs]``, computed by ``workers`` processes (None: one per core).

    The results do not depend on ``workers``. Put long jobs first. A script that calls this must be guarded by
    ``if __name__ == "__main__"``, as always with fresh processes. Raises what a job raised, or `TurnoutError`
    when a process was killed.
    """
    count = min(len(jobs), workers or _cores())
    results: list[Result] = []
    if count <= 1 or not _main_can_be_imported():
        for job in jobs:
            results.append(function(job))
            _tell(progress, what, len(results), len(jobs))
        return results
    # Fresh processes: a fork would inherit locks held by threads, such as those that draw a progress bar.
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(function, job) for job in jobs]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                _tell(progress, what, done, len(jobs))
        except BrokenProcessPool as error:
            raise TurnoutError(
                f"a process computing {what!r} was killed from outside, perhaps for memory; run the study "
                "again, with workers=1 if it repeats."
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _main_can_be_imported() -> bool:
    """Fresh processes import the main program's file, which a program read from standard input lacks."""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    return path is None or Path(path).exists()


def _tell(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)
