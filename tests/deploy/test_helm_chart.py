"""The Helm chart: linted, rendered for several values, and checked against the schemas of Kubernetes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "turnout"
CASES = {"defaults": None, "fleet": CHART / "ci/fleet-values.yaml", "edge": CHART / "ci/edge-values.yaml"}
VERSIONS = ("1.29", "1.34")
pytestmark = pytest.mark.deploy


@pytest.fixture(scope="module")
def chart(deploy_tool: Any) -> Any:
    deploy_tool("helm_python")
    import helm_python

    return helm_python.Chart.load(str(CHART))


def values(case: str) -> dict[str, Any]:
    path = CASES[case]
    return {} if path is None else yaml.safe_load(path.read_text())


def manifests(chart: Any, case: str) -> list[dict[str, Any]]:
    rendered = chart.render(values(case), name="demo", namespace="fl")
    texts = [text for name, text in rendered.items() if name.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def pods(documents: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (document["metadata"]["name"], document["spec"]["template"]["spec"])
        for document in documents
        if document["kind"] in ("Deployment", "StatefulSet")
    ]


@pytest.mark.parametrize("case", CASES)
def test_lint(case: str, deploy_tool: Any) -> None:
    deploy_tool("helm_python")
    import helm_python

    report = helm_python.lint(str(CHART), values(case), strict=True)
    assert report["errors"] == []
    assert all(message["severity"] <= 1 for message in report["messages"]), report["messages"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_kubernetes_takes_it(case: str, version: str, chart: Any, deploy_tool: Any, tmp_path: Path) -> None:
    deploy_tool("kubernetes-validate")
    known = [document for document in manifests(chart, case) if document["kind"] != "ServiceMonitor"]
    rendered = tmp_path / "rendered.yaml"
    rendered.write_text(yaml.safe_dump_all(known))
    tool = Path(sys.executable).parent / "kubernetes-validate"
    command = [tool, "--strict", "-k", version, rendered]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kinds(chart: Any) -> None:
    def count(case: str) -> dict[str, int]:
        kinds = [document["kind"] for document in manifests(chart, case)]
        return {kind: kinds.count(kind) for kind in kinds}

    assert count("defaults") == {
        "ConfigMap": 1, "Service": 3, "StatefulSet": 1, "PodDisruptionBudget": 1, "Deployment": 1,
        "NetworkPolicy": 3,
    }  # fmt: skip
    assert count("fleet") == {
        "ConfigMap": 1, "Service": 4, "StatefulSet": 1, "PodDisruptionBudget": 2, "Deployment": 4,
        "NetworkPolicy": 3, "PersistentVolumeClaim": 3, "ServiceMonitor": 1,
    }  # fmt: skip
    assert count("edge") == {"Deployment": 1, "Service": 1, "NetworkPolicy": 1}


@pytest.mark.parametrize("case", CASES)
def test_pods_keep_to_the_level_restricted(case: str, chart: Any) -> None:
    for name, pod in pods(manifests(chart, case)):
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        assert pod["automountServiceAccountToken"] is False
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"]["drop"] == ["ALL"]
            assert not container["image"].endswith(":latest")
            assert container["resources"]["limits"]["memory"]
        for container in pod["containers"]:
            assert {"livenessProbe", "startupProbe"} <= container.keys()
            ports = {port["name"] for port in container["ports"]}
            for probe in ("livenessProbe", "startupProbe", "readinessProbe"):
                how = container.get(probe, {}).get("httpGet") or container.get(probe, {}).get("tcpSocket")
                assert how is None or how["port"] in ports
        mounted = {
            m["name"] for c in [*pod["containers"], *pod.get("initContainers", [])] for m in c["volumeMounts"]
        }
        claimed = {"data"} if name.endswith("-server") else set()
        assert mounted - claimed == {volume["name"] for volume in pod["volumes"]} - claimed


@pytest.mark.parametrize("case", ["defaults", "fleet"])
def test_a_server_ends_its_round_before_it_is_killed(case: str, chart: Any) -> None:
    (spec,) = [pod for name, pod in pods(manifests(chart, case)) if name.endswith("-server")]
    (deadline,) = [w for w in spec["containers"][0]["args"] if w.startswith("fleet.deadline=")]
    assert spec["terminationGracePeriodSeconds"] >= float(deadline.partition("=")[2]) + 30


def test_selectors_find_their_pods(chart: Any) -> None:
    documents = manifests(chart, "fleet")
    labels = {
        document["metadata"]["name"]: document["spec"]["template"]["metadata"]["labels"]
        for document in documents
        if document["kind"] in ("Deployment", "StatefulSet")
    }
    for document in documents:
        spec = document.get("spec", {})
        wanted = {
            "Service": lambda s: s["selector"],
            "PodDisruptionBudget": lambda s: s["selector"]["matchLabels"],
            "NetworkPolicy": lambda s: s["podSelector"]["matchLabels"],
        }.get(document["kind"])
        if wanted is not None:
            chosen = [name for name, have in labels.items() if wanted(spec).items() <= have.items()]
            assert chosen, document["metadata"]["name"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"server": {"roundDeadlineSeconds": "soon"}},
        {"image": {"tag": "latest"}},
        {"clients": [{"name": "Edge 1", "certificatesSecret": "c"}]},
        {"clients": [{"name": "edge-1"}]},
        {"servre": {}},
    ],
)
def test_the_schema_refuses(wrong: dict[str, Any], deploy_tool: Any) -> None:
    deploy_tool("helm_python")
    import helm_python

    assert helm_python.lint(str(CHART), wrong)["errors"]


def test_the_charts_version_is_the_packages(chart: Any) -> None:
    from importlib.metadata import version

    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == version("turnout")
