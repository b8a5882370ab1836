"""Worker processes of the simulator: forked, one torch thread each, parameters in shared memory."""

from __future__ import annotations

from turnout.simulation.workers.heap import Ref, SharedHeap
from turnout.simulation.workers.parcels import Parcels
from turnout.simulation.workers.pool import Job, WorkerPool

__all__ = ["Job", "Parcels", "Ref", "SharedHeap", "WorkerPool"]
