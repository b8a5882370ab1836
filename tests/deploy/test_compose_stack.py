"""docker-compose.yml for real, container engine aside: the commands run, rounds are committed, all is up."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from compose_stack import ComposeStack, ask, rounds, until

CLIENTS = ("client-0", "client-1", "client-2")


def test_rounds_are_committed_with_all_clients(stack: ComposeStack) -> None:
    # The clients start beside the server: the first rounds may go without the last of them.
    until(lambda: len(rounds(stack)[1]) >= 5 and rounds(stack)[1][-1].participants == 3)
    assert "TLS both ways" in stack.log("server").read_text()


def test_every_target_is_up(stack: ComposeStack) -> None:
    def targets() -> dict[str, str]:
        found = {t["labels"]["job"] + "/" + t["scrapeUrl"]: t for t in ask(stack, "targets")["activeTargets"]}
        wanted = {
            name: t for name, t in found.items() if "dashboard" not in name or "dashboard" in stack.running
        }
        return {name: t["health"] + t["lastError"] for name, t in wanted.items()}

    with suppress(AssertionError):  # What is asserted below tells more.
        until(lambda: len(targets()) >= 4 and set(targets().values()) == {"up"})
    assert len(targets()) >= 4
    assert set(targets().values()) == {"up"}, targets()
    rules = [rule["name"] for group in ask(stack, "rules")["groups"] for rule in group["rules"]]
    assert "TurnoutNoRoundCommitted" in rules


@pytest.mark.parametrize("service", ["server", *CLIENTS])
def test_a_running_service_is_healthy(service: str, stack: ComposeStack) -> None:
    assert stack.healthy(service)


def test_a_dashboard_is_healthy(stack: ComposeStack) -> None:
    if "dashboard" not in stack.running:
        pytest.skip("this build has no `turnout dashboard`")
    until(lambda: stack.healthy("dashboard"))


def test_keys_are_where_they_belong_and_nowhere_else(stack: ComposeStack) -> None:
    for client in CLIENTS:
        files = sorted(path.name for path in stack.volume(f"certs-{client}").iterdir())
        assert files == ["ca.pem", f"{client}.key", f"{client}.pem"]
    server = sorted(path.name for path in stack.volume("certs-server").iterdir())
    assert server == ["ca.pem", "server.key", "server.pem"]
    for volume in ("server", *CLIENTS):
        for key in stack.volume(f"certs-{volume}").glob("*.key"):
            assert key.stat().st_mode & 0o077 == 0


def test_the_log_is_json_and_says_run_and_round(stack: ComposeStack) -> None:
    run_id, _ = until(lambda: rounds(stack))
    lines = [json.loads(line) for line in stack.log("server").read_text().splitlines()]
    of_rounds = [line for line in lines if "round" in line]
    assert of_rounds
    assert {line["run"] for line in of_rounds} == {run_id}
    for client in CLIENTS:
        assert all(json.loads(line) for line in stack.log(client).read_text().splitlines())


def test_a_restarted_server_goes_on_with_its_run(stack: ComposeStack) -> None:
    run_id, before = until(lambda: rounds(stack))
    assert stack.stop("server") == 0
    done = len(rounds(stack)[1])
    assert done >= len(before)
    stack.start("server")
    until(lambda: len(rounds(stack)[1]) >= done + 3)
    assert rounds(stack)[0] == run_id
    assert all(stack.running[client].poll() is None for client in CLIENTS)
    # The certificates' job runs again with every `up`, and changes nothing.
    key = stack.volume("certs-server") / "server.key"
    kept = key.read_bytes()
    assert stack.start("certificates").wait(60) == 0
    assert key.read_bytes() == kept
