"""Executors: ways of running the clients of a simulation. One file each."""

from __future__ import annotations

from turnout.simulation.executors.base import Executor
from turnout.simulation.executors.batched import BatchedExecutor
from turnout.simulation.executors.choose import AUTO, EXECUTORS, Choice, choose_executor
from turnout.simulation.executors.processes import ProcessesExecutor
from turnout.simulation.executors.serial import SerialExecutor
from turnout.simulation.executors.threads import ThreadsExecutor

__all__ = [
    "AUTO",
    "EXECUTORS",
    "BatchedExecutor",
    "Choice",
    "Executor",
    "ProcessesExecutor",
    "SerialExecutor",
    "ThreadsExecutor",
    "choose_executor",
]
