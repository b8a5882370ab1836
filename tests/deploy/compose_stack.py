"""docker-compose.yml as processes: the very commands and environments, on loopback and in a folder.

Each service gets a folder that stands for its file system: named volumes are linked there, files copied.
Paths, ports and host names are replaced, and nothing else. What is not Turnout's own is left out, except
Prometheus.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from dockerfile import Dockerfile

from turnout.server import RoundRow, RunStore

REPOSITORY = Path(__file__).parents[2]
COMPOSE = REPOSITORY / "docker-compose.yml"
BIN = Path(sys.executable).parent
PATIENCE = 120.0
TEXT = (".yml", ".toml", ".py", ".sh")
LEFT_OUT = ("grafana",)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ComposeStack:
    """The services of docker-compose.yml; started in the order of depends_on, stopped the other way round."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.document: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
        self.services = {name: s for name, s in self.document["services"].items() if name not in LEFT_OUT}
        if subprocess.run([BIN / "turnout", "dashboard", "--help"], capture_output=True).returncode:
            del self.services["dashboard"]  # A build without it.
        self.ports: dict[tuple[str, str], int] = {}
        self.running: dict[str, subprocess.Popen[str]] = {}
        for secret in self.document["secrets"]:
            (folder / secret).write_text("a-secret-of-the-tests-0123456789\n")
            (folder / secret).chmod(0o600)

    def __enter__(self) -> ComposeStack:
        try:
            for name in self._in_order():
                for other, how in self.services[name].get("depends_on", {}).items():
                    self._wait(other, how["condition"])
                self.start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.kill()
            process.wait()

    def start(self, name: str) -> subprocess.Popen[str]:
        """Start one service, again if it was stopped."""
        root = self._root(name)
        with self.log(name).open("a") as log:
            self.running[name] = subprocess.Popen(
                self.command(name),
                cwd=self._place(name, root),
                env=self.environment(name),
                stdout=log,
                stderr=log,
                text=True,
            )
        return self.running[name]

    def stop(self, name: str) -> int:
        """Ask a service to end and return its exit code; TimeoutExpired beyond its stop_grace_period."""
        grace = float(self.services[name].get("stop_grace_period", "10s").removesuffix("s"))
        self.running[name].send_signal(signal.SIGTERM)
        return self.running[name].wait(grace)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def volume(self, name: str) -> Path:
        path = self.folder / "volumes" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def port(self, service: str, container_port: str) -> int:
        """Return the port of this machine that stands for ``service``'s."""
        return self.ports.setdefault((service, container_port), free_port())

    def command(self, name: str) -> list[str]:
        service = self.services[name]
        if "image" in service and service["image"].startswith("prom/prometheus"):
            words = ["prometheus", *service["command"]]
        else:
            entry = service.get("entrypoint") or self._stage(name).exec_form("ENTRYPOINT")
            words = [*entry, *(service.get("command") or self._stage(name).exec_form("CMD"))]
        return self._program([self._translated(name, word) for word in words])

    def environment(self, name: str) -> dict[str, str]:
        said = {str(key): str(value) for key, value in self.services[name].get("environment", {}).items()}
        image = {} if self._stage(name) is None else self._stage(name).environment()
        image.pop("PATH", None)
        merged = {key: self._translated(name, value) for key, value in (image | said).items()}
        return {"PATH": f"{BIN}:{os.environ['PATH']}", **merged, "HOME": str(self.folder)}

    def healthy(self, name: str) -> bool:
        """Run the service's healthcheck, the file's or the image's."""
        check = self.services[name].get("healthcheck", {}).get("test")
        words = check[1:] if check else self._stage(name).exec_form("HEALTHCHECK")
        words = [self._translated(name, word) for word in words]
        if words[0] == "wget":  # Not on every machine that tests.
            with urllib.request.urlopen(words[-1], timeout=5) as answer:
                return bool(answer.status == 200)
        done = subprocess.run(self._program(words), env=self.environment(name), capture_output=True)
        return done.returncode == 0

    def _wait(self, name: str, condition: str) -> None:
        if name not in self.running:
            return
        process, end = self.running[name], time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if condition == "service_completed_successfully" and process.poll() is not None:
                assert process.returncode == 0, self.log(name).read_text()
                return
            if condition == "service_healthy":
                assert process.poll() is None, self.log(name).read_text()
                try:
                    if self.healthy(name):
                        return
                except OSError:
                    pass
            time.sleep(0.2)
        raise AssertionError(f"{name} is not {condition}: {self.log(name).read_text()}")

    def _in_order(self) -> list[str]:
        order: list[str] = []

        def add(name: str) -> None:
            for other in self.services[name].get("depends_on", {}):
                if other in self.services:
                    add(other)
            if name not in order:
                order.append(name)

        for name in self.services:
            add(name)
        return order

    def _stage(self, name: str) -> Any:
        """Return the stage of the service's image; clients share the image that ``model`` builds."""
        image = self.services[name]["image"]
        for service in self.services.values():
            if service["image"] == image and "build" in service:
                build = service["build"]
                return Dockerfile.read(REPOSITORY / build["dockerfile"]).stage(build.get("target", ""))
        return None

    def _place(self, name: str, root: Path) -> Path:
        """Return the working directory; the root where nothing is mounted there."""
        stage = self._stage(name)
        own = self.services[name].get("working_dir") or (stage.last("WORKDIR") if stage is not None else "/")
        place = root / str(own).lstrip("/")
        return place if place.is_dir() else root

    def _root(self, name: str) -> Path:
        """Lay out the service's file system, once."""
        root = self.folder / "roots" / name
        if root.exists():
            return root
        for source, target in self._mounts(name):
            place = root / target.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.startswith("./"):
                self._copy(name, REPOSITORY / source, place)
            else:
                place.symlink_to(self.volume(source))
        for secret in self.services[name].get("secrets", []):
            place = root / "run" / "secrets" / secret
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(self.folder / secret)
        return root

    def _mounts(self, name: str) -> list[tuple[str, str]]:
        pairs = [volume.split(":")[:2] for volume in self.services[name].get("volumes", [])]
        return [(source, target) for source, target in pairs]

    def _copy(self, name: str, source: Path, place: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, place)
        else:
            shutil.copy(source, place)
        for file in [place, *place.rglob("*")] if place.is_dir() else [place]:
            if file.is_file() and file.suffix in TEXT:
                # A scrape every second: tests do not wait a quarter of a minute for each.
                text = file.read_text(encoding="utf-8").replace("_interval: 15s", "_interval: 1s")
                file.write_text(self._translated(name, text), encoding="utf-8")

    def _program(self, words: list[str]) -> list[str]:
        known = {
            "turnout": [str(BIN / "turnout")],
            "python": [sys.executable],
            "turnout-healthcheck": [sys.executable, str(REPOSITORY / "deploy/docker/healthcheck.py")],
        }
        return [*known.get(words[0], [words[0]]), *words[1:]]

    def _translated(self, name: str, text: str) -> str:
        """Return ``text`` with this service's paths, ports and peers as they are on this machine."""
        root = self.folder / "roots" / name
        places = {target for _, target in self._mounts(name)} | {"/run/secrets", "/app"}
        for place in sorted(places, key=len, reverse=True):
            text = re.sub(rf"(?<![\w.]){re.escape(place)}(?![\w-])", str(root) + place, text)
        peers = "|".join(self.document["services"])
        text = re.sub(
            rf"\b(?:https?://)?({peers}):(\d+)\b",
            lambda match: match[0].replace(
                f"{match[1]}:{match[2]}", f"127.0.0.1:{self.port(match[1], match[2])}"
            ),
            text,
        )
        text = re.sub(
            r"\b(?:0\.0\.0\.0|127\.0\.0\.1):(\d+)\b(?!\d)",
            lambda match: f"127.0.0.1:{self._own(name, match[1])}",
            text,
        )
        return str(self.port(name, text)) if text == "8050" else text

    def _own(self, name: str, port: str) -> int:
        taken = {str(value) for value in self.ports.values()}
        return int(port) if port in taken else self.port(name, port)


def until(check: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Return what ``check`` returns as soon as it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := check():
                return found
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"nothing came within {seconds:g} seconds: {check()}")


def rounds(stack: ComposeStack) -> tuple[str, list[RoundRow]]:
    with RunStore(stack.volume("data") / "runs", create=False) as store:
        runs = store.runs()
        assert len(runs) == 1
        return runs[0].id, store.rounds(runs[0].id)


def ask(stack: ComposeStack, path: str, **query: str) -> Any:
    url = f"http://127.0.0.1:{stack.port('prometheus', '9090')}/api/v1/{path}"
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
        return json.load(answer)["data"]
