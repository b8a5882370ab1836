"""What a node measures of itself and reports on the stream, as metrics by kebab-case name.

What cannot be measured here is left out: a node without a GPU reports no GPU.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from functools import cache, lru_cache
from typing import Any, Final

_STATM: Final = "/proc/self/statm"


def of_task(
    task_seconds: float, reply_bytes: int, request_bytes: int, examples: int | None
) -> dict[str, float]:
    """Return the metrics of one finished task; ``examples`` are those it trained on, None when unknown."""
    metrics = {
        "task-seconds": float(task_seconds),
        "reply-bytes": float(reply_bytes),
        "request-bytes": float(request_bytes),
    }
    if examples and task_seconds > 0:
        metrics["samples-per-second"] = examples / task_seconds
    return metrics


def of_node() -> dict[str, float]:
    """Return the state of this process and its GPUs: memory in bytes, CPU in seconds, utilization 0 to 1.

    ``gpu-memory-bytes`` is what this process has reserved, ``gpu-device-memory-bytes`` what is in use on the
    devices by anyone, out of ``gpu-device-memory-total-bytes``. Measured at most once a second, so that every
    reply can carry it.
    """
    return dict(_measured(int(time.monotonic())))


@lru_cache(maxsize=1)
def _measured(_second: int) -> dict[str, float]:
    metrics = {"cpu-seconds": time.process_time()}
    resident = _resident_bytes()
    if resident is not None:
        metrics["memory-bytes"] = float(resident)
    return metrics | _torch_memory() | _devices()


def gpu_names() -> list[str]:
    """Return the names of the GPUs that this process may use, as the driver tells them; empty without one."""
    nvml = _nvml()
    return [] if nvml is None else [str(nvml.nvmlDeviceGetName(handle)) for handle in _handles()]


def _resident_bytes() -> int | None:
    try:
        with open(_STATM, encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):  # Not Linux.
        return None


def _torch_memory() -> dict[str, float]:
    """Ask PyTorch only where the app has loaded it and uses CUDA: asking first would start CUDA."""
    torch: Any = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return {}
    return {"gpu-memory-bytes": float(sum(cuda.memory_reserved(i) for i in range(cuda.device_count())))}


@cache
def _nvml() -> Any | None:
    """Return NVIDIA's management library where it (package nvidia-ml-py) and a driver are installed."""
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


@cache
def _handles() -> list[Any]:
    """Return the devices that this process may use, by ``CUDA_VISIBLE_DEVICES`` where it is set."""
    nvml = _nvml()
    if nvml is None:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    handles = []
    for word in visible.split(","):
        try:
            if word.strip().isdigit():
                handles.append(nvml.nvmlDeviceGetHandleByIndex(int(word)))
            else:
                handles.append(nvml.nvmlDeviceGetHandleByUUID(word.strip()))
        except nvml.NVMLError:
            break  # CUDA, too, ignores the first device that does not exist and those after it.
    return handles


def _devices() -> dict[str, float]:
    nvml, handles = _nvml(), _handles()
    if nvml is None or not handles:
        return {}
    try:
        memory = [nvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        rates = [nvml.nvmlDeviceGetUtilizationRates(handle) for handle in handles]
    except nvml.NVMLError:  # A device that was lost, or one that does not tell (a slice of a shared GPU).
        return {}
    return {
        "gpu-device-memory-bytes": float(sum(m.used for m in memory)),
        "gpu-device-memory-total-bytes": float(sum(m.total for m in memory)),
        "gpu-utilization": sum(rate.gpu for rate in rates) / (100 * len(rates)),
    }
