from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "proto"
STUBS = ("fleet_pb2.py", "fleet_pb2.pyi", "fleet_pb2_grpc.py")


def test_checked_in_stubs_are_those_of_the_proto(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools, of the extra 'dev', generates the stubs")
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT)]
    command += [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run([*command, "turnout/v1/fleet.proto"], check=True, cwd=ROOT)
    for name in STUBS:
        made, kept = tmp_path / "turnout/v1" / name, ROOT / "turnout/v1" / name
        assert made.read_text() == kept.read_text(), f"{name} is out of date: run make stubs"
