"""Clients compute with one PyTorch thread, whenever PyTorch comes."""

from __future__ import annotations

import subprocess
import sys

import pytest

_FIRST = "import torch; torch.set_num_threads(3)"
_WITHIN = """
import os
from turnout.wire.torch_threads import one_torch_thread
before = dict(os.environ)
with one_torch_thread():
    import torch
    assert torch.get_num_threads() == 1, torch.get_num_threads()
assert dict(os.environ) == before
"""


@pytest.mark.parametrize("first", ["", _FIRST], ids=["imported-by-the-app", "imported-before"])
def test_one_thread(first: str) -> None:
    after = f"{_WITHIN}\nassert not {bool(first)} or torch.get_num_threads() == 3"
    ended = subprocess.run(
        [sys.executable, "-c", f"{first}\n{after}"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
