"""A local SuperLink with SuperNodes, or Flower's Ray simulation, for benchmarks and tests.

Nothing is reported to anyone, no dependency is installed when an app runs, and state is in memory.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fleet_superlink import free_port, reachable, running

COMMANDS = Path(sys.executable).parent


def environment(home: Path) -> dict[str, str]:
    """Return the environment of Flower's commands, which find this Python's Turnout."""
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{COMMANDS}{os.pathsep}{os.environ['PATH']}",
    }


def flower(command: str) -> str:
    """Return the path of one of Flower's commands, of this Python's installation."""
    found = COMMANDS / command
    return str(found) if found.exists() else command


def node_config(values: Mapping[str, Any]) -> str:
    return " ".join(
        f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in values.items()
    )


class SuperLink:
    """A running SuperLink; ``home`` keeps its logs and configuration."""

    def __init__(self, home: Path, *, simulation_nodes: int = 0) -> None:
        self.home = home
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._stack = contextlib.ExitStack()
        self._nodes: dict[int, contextlib.ExitStack] = {}
        home.mkdir(parents=True, exist_ok=True)
        options = f"options.num-supernodes = {simulation_nodes}\n" if simulation_nodes else ""
        if simulation_nodes:
            options += "options.backend.client-resources.num-cpus = 1\n"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "{self.address}"\n'
            f"insecure = true\n{options}"
        )
        command = [flower("flower-superlink"), "--insecure", "--isolation", "subprocess", "--host",
                   "127.0.0.1", "--port", str(self.port),
                   "--disable-runtime-dependency-installation"]  # fmt: skip
        if simulation_nodes:
            command.append("--simulation")
        self._stack.enter_context(running(command, environment(home), home / "superlink.log"))

    def __enter__(self) -> SuperLink:
        reachable(self.port)
        return self

    def __exit__(self, *error: object) -> None:
        for number in list(self._nodes):
            self.stop_node(number)
        self._stack.close()

    def start_node(self, number: int, **values: Any) -> None:
        """Start the SuperNode of partition ``number``."""
        values = {"partition-id": number, **values}
        command = [flower("flower-supernode"), "--insecure", "--superlink", self.address, "--isolation",
                   "subprocess", "--host", "127.0.0.1", "--port", str(free_port()),
                   "--node-config", node_config(values)]  # fmt: skip
        stack = self._nodes[number] = contextlib.ExitStack()
        log = self.home / f"supernode-{number}-{time.monotonic_ns()}.log"
        stack.enter_context(running(command, environment(self.home), log))

    def stop_node(self, number: int) -> None:
        self._nodes.pop(number).close()

    def run(self, app: Path, config: Mapping[str, Any], *more: str, timeout: float = 300) -> str:
        """Run ``app`` with ``flwr run`` and return what it logged, once it has ended."""
        command = [flower("flwr"), "run", str(app), "local", "--stream", *more]
        if config:
            command += ["--run-config", node_config(config)]
        done = subprocess.run(
            command, env=environment(self.home), capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise RuntimeError(f"flwr run failed: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def logs(self) -> str:
        """Return the end of every log."""
        return "\n".join(
            f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.home.glob("*.log"))
        )


@contextlib.contextmanager
def federation(home: Path, clients: Sequence[int], **values: Any) -> Iterator[SuperLink]:
    """A SuperLink with one SuperNode for each of ``clients``."""
    with SuperLink(home) as link:
        for client in clients:
            link.start_node(client, **values)
        yield link
