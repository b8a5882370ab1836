"""The dashboard's own metrics, and answers that are compressed on request."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from turnout.dashboard import Dashboard, DashboardOptions


def test_requests_are_counted_by_route_and_status(recorded: Path) -> None:
    with (
        Dashboard(recorded, DashboardOptions(port=0), catalogue=list) as served,
        httpx.Client(base_url=served.url) as client,
    ):
        for path in ("api/v1/runs", "api/v1/runs", "api/v1/runs/one", "api/v1/runs/two", "runs", "x/y/z"):
            client.get(path)
        text = client.get("metrics").text
    counts = dict(line.rsplit(" ", 1) for line in text.splitlines() if "requests_total{" in line)
    name = "turnout_dashboard_requests_total"
    assert counts[f'{name}{{route="/api/v1/runs",status="200"}}'] == "2.0"
    assert counts[f'{name}{{route="/api/v1/runs/{{run}}",status="404"}}'] == "2.0"
    assert counts[f'{name}{{route="/runs",status="200"}}'] == "1.0"
    assert not any("one" in key or "x/y/z" in key for key in counts)  # No address is a label.


def test_metrics_are_in_the_format_that_is_asked_for(served: Dashboard) -> None:
    plain = httpx.get(f"{served.url}metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    opened = httpx.get(f"{served.url}metrics", headers={"Accept": "application/openmetrics-text"})
    assert opened.headers["content-type"].startswith("application/openmetrics-text")
    assert opened.text.endswith("# EOF\n")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs the Debian package prometheus")
def test_promtool_accepts_them(served: Dashboard) -> None:
    httpx.get(f"{served.url}api/v1/runs")
    text = httpx.get(f"{served.url}metrics").content
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_long_answers_are_compressed_and_streams_are_not(served: Dashboard, run: str) -> None:
    with httpx.Client(base_url=served.url, headers={"Accept-Encoding": "gzip"}) as client:
        with client.stream("GET", f"api/v1/runs/{run}/rounds") as answer:
            assert answer.headers["content-encoding"] == "gzip"
            assert gzip.decompress(b"".join(answer.iter_raw())).startswith(b'{"items"')
        with client.stream("GET", f"api/v1/runs/{run}/export/clients.csv") as answer:
            assert answer.headers["content-encoding"] == "gzip"
        with client.stream("GET", "api/v1/stream") as answer:
            assert "content-encoding" not in answer.headers
            assert answer.headers["x-accel-buffering"] == "no"
            assert answer.headers["cache-control"] == "no-cache"
