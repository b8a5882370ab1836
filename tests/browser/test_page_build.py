"""How the page gets to users: pinned, built once, in the wheel with the licences of what it bundles."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from browser_harness import BUILT, REPOSITORY, unavailable

sys.path.append(str(REPOSITORY))

import hatch_build

UI = REPOSITORY / "server/turnout/dashboard/ui"


def test_what_the_page_is_made_of_is_pinned_without_addresses() -> None:
    package = json.loads((UI / "package.json").read_text(encoding="utf-8"))
    wanted = package["dependencies"] | package["devDependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values()), wanted
    locked = json.loads((UI / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    for path, entry in locked.items():
        assert "resolved" not in entry, path
        assert not path or entry["integrity"].startswith("sha512-"), path
    for name, version in wanted.items():
        assert locked[f"node_modules/{name}"]["version"] == version


def test_the_digest_sees_every_change_of_the_sources(tmp_path: Path) -> None:
    for path in hatch_build.source_files(REPOSITORY):
        copy = tmp_path / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    before = hatch_build.digest_of_sources(tmp_path)
    assert before == hatch_build.digest_of_sources(REPOSITORY)
    changed = set()
    for path in hatch_build.source_files(tmp_path):
        path.write_bytes(path.read_bytes() + b" ")
        changed.add(hatch_build.digest_of_sources(tmp_path))
    assert len(changed) == len(list(hatch_build.source_files(tmp_path)))
    assert before not in changed


@pytest.fixture(scope="module")
def built() -> Path:
    if not BUILT.is_file():
        unavailable("the dashboard's page is not built: make page")
    return BUILT.parent


def test_a_built_page_is_of_these_sources_and_is_not_built_again(built: Path) -> None:
    assert hatch_build.stamp_of(REPOSITORY).read_text() == hatch_build.digest_of_sources(REPOSITORY)
    hook = hatch_build.PageBuildHook(str(REPOSITORY), {}, None, None, "", "wheel", None)
    assert hook.dependencies() == []
    before = [path.stat().st_mtime_ns for path in sorted(built.rglob("*.js"))]
    data: dict[str, list[str]] = {"artifacts": []}
    hook.initialize("standard", data)
    assert [path.stat().st_mtime_ns for path in sorted(built.rglob("*.js"))] == before
    assert data["artifacts"] == ["/server/turnout/dashboard/static/**"]


def test_without_npm_an_editable_install_goes_on_and_a_wheel_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in hatch_build.source_files(REPOSITORY):
        copy = tmp_path / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    broken = [sys.executable, "-c", "import sys; sys.exit('no registry')"]
    monkeypatch.setattr(hatch_build, "npm", lambda: broken)
    said: list[str] = []

    class Application:
        def display_warning(self, text: str) -> None:
            said.append(text)

    hook = hatch_build.PageBuildHook(str(tmp_path), {}, None, None, "", "wheel", Application())
    hook.initialize("editable", {"artifacts": []})
    assert len(said) == 1
    assert "no registry" in said[0]
    assert "make page" in said[0]
    with pytest.raises(subprocess.CalledProcessError):
        hook.initialize("standard", {"artifacts": []})


def test_a_wheel_from_the_sdist_has_the_page_and_its_licences_without_node(
    built: Path, tmp_path: Path
) -> None:
    def run(*words: str) -> None:
        command = [sys.executable, "-m", *words]
        environment = {**os.environ, "PATH": str(Path(sys.executable).parent)}  # Where no Node is.
        subprocess.run(command, check=True, cwd=REPOSITORY, env=environment, capture_output=True, timeout=120)

    run("hatchling", "build", "-t", "sdist", "-d", str(tmp_path))
    [sdist] = tmp_path.glob("*.tar.gz")
    run("pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(sdist))
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        licences = archive.read("turnout/dashboard/static/THIRD_PARTY_LICENSES.txt").decode()
    inside = {f"turnout/dashboard/static/{path.relative_to(built).as_posix()}" for path in built.rglob("*.*")}
    assert {name for name in inside if Path(name).suffix} <= names
    assert "turnout/wire/__init__.py" in names
    assert not [name for name in names if "/ui/" in name or "node_modules" in name]
    for package in ("preact", "uplot"):
        version = json.loads((UI / "package.json").read_text())["dependencies"][package]
        assert f"{package} {version}" in licences
    assert licences.count("Permission is hereby granted") == 2


def test_the_page_is_light(built: Path) -> None:
    files = list(built.rglob("*.gz"))
    assert len(files) == 2
    assert sum(path.stat().st_size for path in files) < 100_000
