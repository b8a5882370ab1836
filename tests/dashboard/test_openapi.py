"""The OpenAPI document: Schemathesis sends what it allows and what it forbids, and checks every answer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from turnout.dashboard import Dashboard, DashboardOptions

TOKEN = "a token of thirty-two characters"
PATHS = {
    "/api/v1/compare", "/api/v1/diff", "/api/v1/events", "/api/v1/export/runs.{format_}", "/api/v1/info",
    "/api/v1/methods", "/api/v1/runs", "/api/v1/runs/{run}", "/api/v1/runs/{run}/attention",
    "/api/v1/runs/{run}/clients", "/api/v1/runs/{run}/clients/{client}",
    "/api/v1/runs/{run}/clients/{client}/rounds", "/api/v1/runs/{run}/events",
    "/api/v1/runs/{run}/export/{table}.{format_}", "/api/v1/runs/{run}/fairness",
    "/api/v1/runs/{run}/participation", "/api/v1/runs/{run}/participation/layout",
    "/api/v1/runs/{run}/rounds",
    "/api/v1/runs/{run}/series", "/api/v1/session", "/api/v1/stream", "/healthz", "/metrics", "/readyz",
}  # fmt: skip


def schemathesis(served: Dashboard, config: Path, *options: str) -> None:
    tool = Path(sys.executable).with_name("schemathesis")
    done = subprocess.run(
        [
            tool, "--config-file", config, "run", f"{served.url}openapi.json", "--exclude-checks",
            "unsupported_method", "--request-timeout", "3", "--suppress-health-check", "all", "--seed", "1",
            *options,
        ],
        capture_output=True, text=True, timeout=170, cwd=config.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-1_000:]


@pytest.mark.slow
def test_schemathesis_finds_nothing(served: Dashboard, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text("")
    schemathesis(
        served, tmp_path / "schemathesis.toml", "--max-examples", "12", "--exclude-path", "/api/v1/stream"
    )


@pytest.mark.slow
def test_schemathesis_with_known_runs(served: Dashboard, run: str, tmp_path: Path) -> None:
    """Below a run the answers are what their schemas say, not only 404."""
    (tmp_path / "schemathesis.toml").write_text(f'[parameters]\nrun = "{run}"\nclient = 3\n')
    schemathesis(
        served, tmp_path / "schemathesis.toml", "--include-path-regex", "/runs/{run}", "--max-examples", "10",
        "--phases", "fuzzing", "--mode", "positive",
    )  # fmt: skip


def test_everything_is_described(served: Dashboard) -> None:
    document = httpx.get(f"{served.url}openapi.json").json()
    assert set(document["paths"]) == PATHS
    error = {"$ref": "#/components/schemas/ErrorBody"}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            for status, answer in operation["responses"].items():
                if status >= "400":
                    assert answer["content"]["application/json"]["schema"] == error, (path, method, status)
                else:
                    assert answer.get("content") or status == "204", (path, method, status)
    assert {"Hello", "Update", "Resync", "Bye", "RunSummary"} <= set(document["components"]["schemas"])
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_the_document_needs_a_login_where_data_does(recorded: Path) -> None:
    with Dashboard(recorded, DashboardOptions(port=0, token=TOKEN), catalogue=list) as served:
        assert httpx.get(f"{served.url}openapi.json").status_code == 401
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"{served.url}openapi.json", headers=headers).status_code == 200
