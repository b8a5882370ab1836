"""What a node reports of itself is measured, or left out."""

from __future__ import annotations

import mmap
import subprocess
import sys
import time
from pathlib import Path

import pytest

from turnout.client.node import telemetry


def test_a_task_is_described_by_what_is_known_of_it() -> None:
    assert telemetry.of_task(2.0, 100, 300, 50) == {
        "task-seconds": 2.0,
        "reply-bytes": 100.0,
        "request-bytes": 300.0,
        "samples-per-second": 25.0,
    }
    for seconds, examples in ((2.0, None), (2.0, 0), (0.0, 50)):
        assert "samples-per-second" not in telemetry.of_task(seconds, 1, 1, examples)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc (Linux)")
def test_memory_and_cpu_are_those_of_the_process() -> None:
    before = telemetry.of_node()
    ballast = mmap.mmap(-1, 64 << 20)  # Not of the heap, which may have as much to spare.
    for page in range(0, len(ballast), mmap.PAGESIZE):
        ballast[page] = 1
    total = sum(i * i for i in range(300_000))
    time.sleep(1.1)  # It is measured once a second.
    after = telemetry.of_node()
    assert len(ballast) > total % 2
    ballast.close()
    assert 32 << 20 < after["memory-bytes"] - before["memory-bytes"] < 256 << 20
    assert 0 < after["cpu-seconds"] - before["cpu-seconds"] < 30


def test_asking_loads_no_torch_and_starts_no_cuda() -> None:
    code = (
        "import sys; from turnout.client.node import telemetry; telemetry.of_node(); "
        "assert 'torch' not in sys.modules; import torch; telemetry.of_node(); "
        "assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_gpus_are_reported_as_the_driver_sees_them() -> None:
    metrics, names = telemetry.of_node(), telemetry.gpu_names()
    if not names:
        assert not [name for name in metrics if name.startswith("gpu-device") or name == "gpu-utilization"]
        pytest.skip("no NVIDIA driver, or package nvidia-ml-py is not installed")
    assert 0 <= metrics["gpu-utilization"] <= 1
    assert 0 < metrics["gpu-device-memory-bytes"] <= metrics["gpu-device-memory-total-bytes"]
