"""The Grafana dashboard: generated, and every panel's query answered by a real Prometheus."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from compose_stack import ComposeStack, ask, rounds, until

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"
BOARD: dict[str, Any] = json.loads((FOLDER / "turnout.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def expressions() -> list[tuple[str, str]]:
    return [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grafana_dashboard", FOLDER / "dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.deploy
def test_the_dashboard_is_what_its_script_writes(deploy_tool: Any) -> None:
    deploy_tool("grafana_foundation_sdk")
    assert generator().render() == (FOLDER / "turnout.json").read_text(encoding="utf-8")


def test_its_form() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert BOARD["schemaVersion"] >= 36
    variables = {variable["name"]: variable["type"] for variable in BOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "job": "query", "instance": "query"}
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            for selector in re.findall(r"\{(.*?)\}", target["expr"]):
                assert 'job=~"$job", instance=~"$instance"' in selector


def test_provisioning_points_to_it() -> None:
    source = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yml").read_text())
    assert [entry["type"] for entry in source["datasources"]] == ["prometheus"]
    boards = yaml.safe_load((FOLDER / "provisioning/dashboards/turnout.yml").read_text())
    folder = boards["providers"][0]["options"]["path"]
    compose = (FOLDER.parents[1] / "docker-compose.yml").read_text()
    assert f"./deploy/grafana/turnout.json:{folder}/turnout.json:ro" in compose


def test_every_panel_shows_something(stack: ComposeStack) -> None:
    until(lambda: len(rounds(stack)[1]) >= 5)

    def empty() -> list[str]:
        found = []
        for title, expression in expressions():
            if title.startswith("GPU"):  # A machine without one has no such series: never a made-up zero.
                continue
            asked = (
                expression.replace("$__rate_interval", "10s").replace("$job", ".*").replace("$instance", ".*")
            )
            values = [float(sample["value"][1]) for sample in ask(stack, "query", query=asked)["result"]]
            if not any(math.isfinite(value) for value in values):
                found.append(f"{title}: {asked}")
        return found

    until(lambda: not empty(), 40)
    for variable in ("turnout_build_info", 'turnout_build_info{job=~".*"}'):
        assert ask(stack, "query", query=variable)["result"]
