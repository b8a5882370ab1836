"""Prometheus' own tools on the configuration and the alerts, and the runbooks that the alerts name."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "deploy" / "prometheus"
RULES = [
    rule for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]
]
SOURCES = "\n".join(
    path.read_text(encoding="utf-8")
    for root in ("proto", "client", "server")
    for path in (REPOSITORY / root).rglob("*.py")
)


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "rules.yml"),
        ("test", "rules", "rules.test.yml"),
    ],
)
def test_promtool(arguments: tuple[str, ...], promtool: str) -> None:
    done = subprocess.run([promtool, *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_to_fire_and_not_to() -> None:
    tests = [
        case
        for test in yaml.safe_load((FOLDER / "rules.test.yml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    fired = {case["alertname"] for case in tests if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in RULES}


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_an_alert_says_what_to_do(rule: dict[str, dict[str, str]]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert {"summary", "description", "runbook"} <= rule["annotations"].keys()
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert anchor in anchors(REPOSITORY / page)


def test_alerts_are_about_metrics_that_exist() -> None:
    for rule in RULES:
        for name in re.findall(r"\bturnout_\w+", str(rule["expr"])):
            plain = re.sub(r"_(total|count|bucket)$", "", name).removeprefix("turnout_")
            if name.startswith("turnout_dashboard_"):
                continue  # The dashboard's own; see docs/metrics.md.
            assert plain in SOURCES, name
