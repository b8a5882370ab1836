"""The Dockerfiles: what can be said of them without a container engine."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from dockerfile import Dockerfile, Stage

REPOSITORY = Path(__file__).parents[2]
FILES = sorted((REPOSITORY / "deploy").glob("*.Dockerfile"))
# The stages that become images.
IMAGES = [
    pytest.param(path, name, id=f"{path.stem}-{name}")
    for path, names in ((path, ("cpu", "cuda") if path.stem == "client" else (path.stem,)) for path in FILES)
    for name in names
]


def image(path: Path, name: str) -> tuple[Dockerfile, Stage]:
    file = Dockerfile.read(path)
    return file, file.stage(name)


def test_there_are_three() -> None:
    assert [path.stem for path in FILES] == ["client", "dashboard", "server"]


@pytest.mark.parametrize(("path", "name"), IMAGES)
def test_an_image_is_small_and_owned_by_nobody(path: Path, name: str) -> None:
    file, stage = image(path, name)
    assert re.fullmatch(
        r"python:3\.11\.\d+-slim-\w+", file.base(stage)
    )  # A tag of one release, never latest.
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", stage.last("USER"))
    assert stage.exec_form("ENTRYPOINT") == ["turnout"]
    assert stage.exec_form("CMD")[0] in ("server", "client", "dashboard")
    assert stage.exec_form("HEALTHCHECK")[0] == "turnout-healthcheck"
    assert stage.last("STOPSIGNAL") == "SIGTERM"
    labels = " ".join(stage.all("LABEL"))
    for label in ("title", "description", "version", "revision", "licenses"):
        assert f"org.opencontainers.image.{label}=" in labels
    assert not [run for run in stage.all("RUN") if "pip" in run], "only the built venv goes into an image"
    assert stage.environment()["FLWR_TELEMETRY_ENABLED"] == "0"


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps ``path`` from the builder: the last pattern that fits decides."""
    verdict = False
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        fits = [fnmatch.fnmatch(part, pattern) for part in (path, *map(str, Path(path).parents))]
        if any(fits[:-1] if pattern == "*" else fits):
            verdict = not line.startswith("!")
    return verdict


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_copied_exists(path: Path) -> None:
    file = Dockerfile.read(path)
    names = {stage.name for stage in file.stages}
    copied = 0
    for stage in file.stages:
        for text in stage.all("COPY"):
            words = text.split()
            options, places = [w for w in words if w.startswith("--")], [w for w in words if w[:2] != "--"]
            origin = [option.partition("=")[2] for option in options if option.startswith("--from=")]
            if origin:
                assert origin[0] in names
                continue
            for source in places[:-1]:
                assert (REPOSITORY / source).exists(), text
                assert source == "." or not ignored(source), f"{source} is in .dockerignore"
                copied += 1
    assert copied >= 3


def test_what_a_wheel_needs_is_not_ignored() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    build = project["tool"]["hatch"]["build"]
    hooks = [hook.get("path", "hatch_build.py") for hook in build.get("hooks", {}).values()]
    named = [*build["only-include"], *build.get("force-include", {}), *hooks, project["project"]["readme"]]
    for needed in ("pyproject.toml", "LICENSE", "server/turnout/cli/app.py", *named):
        assert not ignored(needed), f"{needed} is in .dockerignore"
    for kept in (".git", ".venv", "runs", "tests", "deploy/compose/secrets/dashboard-token"):
        assert ignored(kept), kept


def test_the_lists_of_packages_are_current() -> None:
    script = REPOSITORY / "deploy" / "requirements.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.deploy
def test_hadolint(deploy_tool: Any) -> None:
    deploy_tool("hadolint")
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [hadolint, "--failure-threshold", "info", *FILES], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout
