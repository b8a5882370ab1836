"""docker-compose.yml against the schema of its format, and against what we promise of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
COMPOSE = REPOSITORY / "docker-compose.yml"
DOCUMENT: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = DOCUMENT["services"]


@pytest.mark.deploy
def test_the_schema_of_compose_files(deploy_tool: Any, tmp_path: Path) -> None:
    deploy_tool("check-jsonschema")
    tool = Path(sys.executable).parent / "check-jsonschema"
    command = [tool, "--builtin-schema", "vendor.compose-spec"]
    good = subprocess.run([*command, COMPOSE], capture_output=True, text=True, timeout=60)
    assert good.returncode == 0, good.stdout
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(COMPOSE.read_text().replace("depends_on:", "dependson:"))
    assert subprocess.run([*command, broken], capture_output=True, timeout=60).returncode == 1


def test_what_is_expected_is_there() -> None:
    assert "name" not in DOCUMENT
    assert set(SERVICES) >= {"certificates", "server", "client-0", "client-1", "client-2", "dashboard",
                             "prometheus", "grafana"}  # fmt: skip


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_hardened_and_pinned(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*", service["image"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    for volume in service["volumes"]:
        source = volume.split(":")[0]
        if source.startswith("./"):
            assert (REPOSITORY / source).exists(), volume
            assert volume.endswith(":ro")
        else:
            assert source in DOCUMENT["volumes"]
    for other in service.get("depends_on", {}):
        assert other in SERVICES
    for network in service.get("networks", []):
        assert network in DOCUMENT["networks"]
    assert service.get("networks") or service.get("network_mode") == "none"


def test_every_volume_and_secret_is_used_and_secrets_are_files() -> None:
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service["volumes"]}
    assert set(DOCUMENT["volumes"]) == {source for source in used if not source.startswith("./")}
    secrets = {secret for service in SERVICES.values() for secret in service.get("secrets", [])}
    assert secrets == set(DOCUMENT["secrets"])
    ignored = (REPOSITORY / ".gitignore").read_text().splitlines()
    for secret in DOCUMENT["secrets"].values():
        assert f"/{Path(secret['file']).parent}/" in ignored
    text = COMPOSE.read_text().lower()
    assert not re.search(r"(password|token)\w*:\s*[a-z0-9]{6,}$", text, flags=re.MULTILINE)


def test_the_server_has_time_to_end_its_round() -> None:
    experiment = (REPOSITORY / "deploy/compose/experiment.toml").read_text()
    deadline = float(re.findall(r"^deadline = ([\d.]+)", experiment, flags=re.MULTILINE)[0])
    assert float(SERVICES["server"]["stop_grace_period"].removesuffix("s")) > deadline
