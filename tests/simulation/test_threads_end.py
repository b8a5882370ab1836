"""A program may end without closing its grid: threads that trained with PyTorch must be gone by then."""

from __future__ import annotations

import subprocess
import sys

# Handlers run in the order opposite to their registration: this one after all of the grid's.
_PROGRAM = """
import atexit, os, sys, threading

def look():
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("turnout-client")]
    if left:
        print("alive at the end:", left, flush=True)
        os._exit(3)

atexit.register(look)

from turnout.client import client_app
from turnout.simulation import LocalGrid
from turnout.strategies import FedAvg
from turnout.tasks import Digits

task = Digits(num_clients=8, partition="iid")
grid = LocalGrid(client_app(task, local_steps=2), 8, executor="threads", workers=8)
FedAvg().start(grid, task.initial_arrays(), num_rounds=2)
assert any(thread.name.startswith("turnout-client") for thread in threading.enumerate())
assert "torch._dynamo" not in sys.modules, "plain SGD needs no compiler, which takes a second to import"
"""


def test_no_idle_thread_outlives_a_program_that_leaves_its_grid_open() -> None:
    ended = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
