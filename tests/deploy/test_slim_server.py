"""The server's image as a plain venv, made by the Dockerfile's own commands: it serves without PyTorch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from compose_stack import free_port
from dockerfile import Dockerfile
from safetensors.numpy import save_file

REPOSITORY = Path(__file__).parents[2]
APP = """
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from turnout.wire import as_array, view

app = ClientApp()

@app.train()
def train(message, context):
    arrays = ArrayRecord({n: as_array(view(a) + np.float32(1)) for n, a in message.content["arrays"].items()})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 3})})
    return Message(content, reply_to=message)
"""
EXPERIMENT = '[run]\nrounds = 3\n[task]\nname = "external"\nmodel = "initial.safetensors"\nnum_clients = 1\n'
BLOCKED = (
    "import sys; from importlib.machinery import PathFinder as F; real = F.find_spec; "
    "gone = lambda name: name.split('.')[0] in ('torch', 'sklearn'); "
    "F.find_spec = classmethod(lambda c, name, *more: None if gone(name) else real(name, *more)); "
    "from turnout.cli import main; sys.argv[0] = 'turnout'; main()"
)


def serve(folder: Path, server: list[str], node: list[str]) -> dict[str, object]:
    """Run an external task with the two commands; return what the server prints at the end."""
    save_file({"w": np.zeros(4, np.float32)}, folder / "initial.safetensors")
    (folder / "own.py").write_text(APP)
    (folder / "x.toml").write_text(EXPERIMENT)
    address = f"127.0.0.1:{free_port()}"
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    serving = subprocess.Popen(
        [*server, "server", "x.toml", "--address", address, "--json", "--resume", "auto"],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    working = subprocess.Popen(
        [*node, "client", "--server", address, "--app", "own:app"], cwd=folder, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        out, said = serving.communicate(timeout=100)
        assert serving.returncode == 0, said
        document: dict[str, object] = json.loads(out)
        working.wait(20)
        return document
    finally:
        for process in (serving, working):
            if process.poll() is None:
                process.kill()
                process.wait()


def test_an_external_task_is_served_where_there_is_no_torch(tmp_path: Path) -> None:
    without = [sys.executable, "-c", BLOCKED]
    document = serve(tmp_path, without, without)
    assert document["rounds"] == 3
    usual = [sys.executable, "-m", "turnout.cli"]
    again = subprocess.run(
        [*without, "server", "x.toml", "--resume", "auto"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert again.returncode == 0
    assert "is finished; there is nothing to do" in again.stderr
    # A run of a machine without PyTorch goes on with the same file on one that has it.
    longer = [
        *usual,
        "server",
        "x.toml",
        "--resume",
        "auto",
        "--set",
        "run.rounds=4",
        "--set",
        "fleet.wait=0.2",
    ]
    more = subprocess.run(longer, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert more.returncode == 4, more.stderr  # No clients came: but nothing differs.


def test_other_tasks_say_what_they_need(tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text('[task]\nname = "digits"\n')
    command = [sys.executable, "-c", BLOCKED, "server", "d.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "task.name = 'digits' needs PyTorch" in done.stderr
    assert "pip install torch" in done.stderr


@pytest.mark.deploy
@pytest.mark.timeout(600)
def test_the_images_commands_make_a_server(tmp_path: Path) -> None:
    """Needs a package index."""
    venv = tmp_path / "venv"
    stage = Dockerfile.read(REPOSITORY / "deploy" / "server.Dockerfile").stage("build")
    began = time.monotonic()
    for command in stage.all("RUN"):
        ours = command.replace("/opt/turnout", str(venv)).replace(
            "python -m venv", f"{sys.executable} -m venv"
        )
        ours = re.sub(r" --no-cache-dir\b", "", ours)  # What was fetched before need not be fetched again.
        done = subprocess.run(ours, shell=True, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, f"{ours}\n{done.stdout}\n{done.stderr}"
    print(f"venv of the server's image: {time.monotonic() - began:.0f} s")
    check = subprocess.run([venv / "bin/pip", "check"], capture_output=True, text=True, timeout=60)
    missing = {line.split()[3].rstrip(",") for line in check.stdout.splitlines() if "requires" in line}
    assert missing == {"torch", "scikit-learn"}, check.stdout
    turnout = [str(venv / "bin" / "turnout")]
    assert serve(tmp_path, turnout, turnout)["rounds"] == 3
