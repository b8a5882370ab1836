"""Who says hello under a wrong name, twice, or after having been revoked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import grpc
import pytest

from turnout.server.fleet import FleetOptions, FleetServer
from turnout.v1 import fleet_pb2 as pb
from turnout.wire import ConfigError

RoundOf = Callable[..., Any]
SMALL, LARGE = 400, 800_000


@pytest.fixture
def server() -> Iterator[FleetServer]:
    with FleetServer(options=FleetOptions(max_offences=100, stall=0.5, reconnect=3)) as running:
        yield running


def test_other_versions_are_refused_naming_both(server: FleetServer, raw_client: ModuleType) -> None:
    with raw_client.RawClient(server.address, "old", 0, protocol=99, package_version="9.9") as old:
        refusal = old.receive("refusal")
        assert refusal.reason == "wrong-version"
        for part in ("protocol 1", "protocol 99", "turnout 9.9"):
            assert part in refusal.detail


@pytest.mark.parametrize(
    ("name", "partitions", "reason"),
    [
        ("../../etc", [0], "bad-name"),
        ("a\nb", [0], "bad-name"),
        ("", [0], "bad-name"),
        ("x" * 65, [0], "bad-name"),
        ("n", [], "bad-hello"),
        ("n", [1, 1], "duplicate-client"),
        ("n", [2**63], "partition-taken"),
        ("thief", [5], "partition-taken"),
    ],
)
def test_bad_hellos_are_refused(
    name: str, partitions: list[int], reason: str, server: FleetServer, raw_client: ModuleType
) -> None:
    with raw_client.RawClient(server.address, "owner", 5) as owner:
        owner.receive("welcome")
        clients = [pb.LogicalClient(partition=partition) for partition in partitions]
        with raw_client.RawClient(server.address, name, None, clients=clients) as bad:
            assert bad.receive("refusal").reason == reason
            with pytest.raises(grpc.RpcError) as caught:
                bad.receive("nothing")
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert [member.name for member in server.roster.members.values()] == ["owner"]


def test_the_same_client_twice_the_newest_wins(
    server: FleetServer, raw_client: ModuleType, round_of: RoundOf
) -> None:
    with raw_client.RawClient(server.address, "a", 0) as older:
        older.receive("welcome")
        with raw_client.RawClient(server.address, "a", 0) as newer:
            newer.receive("welcome")
            assert older.receive("refusal").reason == "replaced"
            running = round_of(server, 1, SMALL)
            newer.finish(newer.receive("task"))
            assert running.result() == {0: ("ok", "")}
    assert server.counters.reasons["replaced"] == 1


def test_a_revoked_client_is_cut_off_and_its_pending_reply_refused(
    server: FleetServer, raw_client: ModuleType, round_of: RoundOf
) -> None:
    with (
        raw_client.RawClient(server.address, "good", 0) as good,
        raw_client.RawClient(server.address, "bad", 1) as bad,
    ):
        running = round_of(server, 2, SMALL)
        bad.receive("task")
        server.call(server.hub.revoke, "bad")
        assert bad.receive("refusal").reason == "revoked"
        good.finish(good.receive("task"))
        assert "revoked" in running.result()[1][1]
        with raw_client.RawClient(server.address, "bad", 1) as again:
            assert again.receive("refusal").reason == "revoked"


def test_the_same_client_twice_the_newer_waits_if_told_so(
    raw_client: ModuleType, round_of: RoundOf, caplog: pytest.LogCaptureFixture
) -> None:
    with FleetServer(options=FleetOptions(same_identity="refuse")) as server:
        with raw_client.RawClient(server.address, "a", 0) as older:
            older.receive("welcome")
            with raw_client.RawClient(server.address, "a", 0) as newer:
                refusal = newer.receive("refusal")
                assert (refusal.reason, refusal.retry) == ("already-connected", True)
                with pytest.raises(grpc.RpcError) as caught:
                    newer.receive("nothing")
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            running = round_of(server, 1, SMALL)
            older.finish(older.receive("task"))
            assert running.result() == {0: ("ok", "")}
        while server.hub.connections:
            threading.Event().wait(0.01)
        with raw_client.RawClient(server.address, "a", 0) as again:
            again.receive("welcome")
    assert server.counters.reasons["already-connected"] == 1
    assert "its key is in use twice" in caplog.text
    with pytest.raises(ConfigError, match="same_identity"):
        FleetOptions(same_identity="both")  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["newest", "refuse"])
def test_two_holders_of_one_key_take_part_once_in_each_round(
    policy: Any, raw_client: ModuleType, round_of: RoundOf
) -> None:
    rounds, name = 6, ("a", 0)
    options = FleetOptions(same_identity=policy, reconnect=5)
    with FleetServer(options=options) as server, raw_client.RawClient(server.address, "good", 1) as good:
        owner = raw_client.RawClient(server.address, *name)
        owner.receive("welcome")
        running = round_of(server, 2, SMALL, rounds=rounds)
        for _ in range(rounds):
            offer = owner.receive("task")
            reply = owner.reply(offer)
            thief = raw_client.RawClient(server.address, *name)
            if policy == "newest":
                stolen = thief.receive("task")  # The same task, once more.
                assert (stolen.id, stolen.attempt) == (offer.id, offer.attempt + 1)
                assert owner.receive("refusal").reason == "replaced"
                for attempt in (stolen, offer, stolen):
                    thief.ready(attempt, reply)
                    owner.ready(attempt, reply)
                owner.close()
                owner = thief
            else:
                assert thief.receive("refusal").reason == "already-connected"
                thief.ready(offer, reply)
                owner.ready(offer, reply)
                thief.close()
            good.finish(good.receive("task"))
        assert running.result() == {0: ("ok", ""), 1: ("ok", "")}
        owner.close()
    assert server.counters.replies["accepted"] == 2 * rounds
    assert (running.strategy.x == rounds).all()
    assert server.counters.reasons["replaced" if policy == "newest" else "already-connected"] == rounds
