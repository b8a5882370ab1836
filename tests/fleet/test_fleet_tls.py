"""Who gets in with which certificate, on real sockets."""

from __future__ import annotations

import datetime
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
from cryptography import x509

from turnout.client.node import ClientTls, NodeRefused, run_node
from turnout.server.fleet import CommitCallback, FleetGrid, FleetServer, ServerTls
from turnout.server.fleet.certs import create_authority, create_client, create_server
from turnout.strategies import FedAvg
from turnout.wire import ConfigError


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, a server, clients of both, expired ones."""
    root = tmp_path_factory.mktemp("pki")
    for authority in ("ours", "theirs"):
        create_authority(root / authority)
        create_server(root / authority, ["localhost", "127.0.0.1"])
        create_client(root / authority, "site-a")
    create_client(root / "ours", "site-b")
    create_client(root / "ours", "expired", days=-1)
    return root


@pytest.fixture(scope="module")
def server(pki: Path) -> Iterator[FleetServer]:
    ours = pki / "ours"
    tls = ServerTls(ours / "server.pem", ours / "server.key", ours / "ca.pem")
    with FleetServer("127.0.0.1:0", tls=tls) as running:
        yield running


def channel(server: FleetServer, ca: Path, pair: Path | None) -> grpc.Channel:
    key = pair.with_name(pair.name + ".key").read_bytes() if pair else None
    certificate = pair.with_name(pair.name + ".pem").read_bytes() if pair else None
    credentials = grpc.ssl_channel_credentials(ca.read_bytes(), key, certificate)
    return grpc.secure_channel(server.address, credentials, [("grpc.use_local_subchannel_pool", 1)])


@pytest.mark.parametrize(
    ("ca", "pair", "name"),
    [
        ("ours", None, "site-a"),
        ("ours", "theirs/site-a", "site-a"),
        ("ours", "ours/expired", "expired"),
        ("ours", "ours/server", "server"),
        ("theirs", "ours/site-a", "site-a"),
    ],
    ids=["no-certificate", "other-authority", "expired", "server-certificate", "server-of-other-authority"],
)
def test_wrong_certificates_end_before_any_handler(
    ca: str, pair: str | None, name: str, server: FleetServer, pki: Path, raw_client: ModuleType
) -> None:
    before = (server.counters.connects, sum(server.counters.reasons.values()))
    made = channel(server, pki / ca / "ca.pem", pki / pair if pair else None)
    with raw_client.RawClient(server.address, name, 0, channel=made) as client:
        with pytest.raises(grpc.RpcError) as caught:
            client.receive("welcome")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (server.counters.connects, sum(server.counters.reasons.values())) == before


def test_plain_text_to_a_tls_port_is_refused(server: FleetServer, raw_client: ModuleType) -> None:
    with raw_client.RawClient(server.address, "site-a", 0) as client, pytest.raises(grpc.RpcError):
        client.receive("welcome")


def test_the_name_is_bound_to_the_certificate(server: FleetServer, pki: Path, raw_client: ModuleType) -> None:
    made = channel(server, pki / "ours/ca.pem", pki / "ours/site-b")
    with raw_client.RawClient(server.address, "site-a", 0, channel=made) as thief:
        refusal = thief.receive("refusal")
        assert refusal.reason == "wrong-name"
        assert "site-b" in refusal.detail
    made = channel(server, pki / "ours/ca.pem", pki / "ours/site-b")
    with raw_client.RawClient(server.address, "site-b", 1, channel=made) as client:
        assert list(client.receive("welcome").ids) == [1]
    assert server.counters.reasons["wrong-name"] >= 1


def test_a_round_over_mutual_tls(
    server: FleetServer, pki: Path, spawn: Callable[..., Any], initial: Callable[..., Any]
) -> None:
    ours = pki / "ours"
    node = spawn("numpy_app.py", server.address, "3-4", "--name", "site-a", "--echo",
                 "--tls", ours / "ca.pem", ours / "site-a.pem", ours / "site-a.key")  # fmt: skip
    grid = FleetGrid(server, min_clients=2, wait=20)
    strategy = FedAvg()
    strategy.start(grid, initial(300_000), num_rounds=2, timeout=20, callbacks=[CommitCallback(grid)])
    assert [report.outcome for report in strategy.reports] == ["ok", "ok"]
    node.terminate()
    assert node.result()["rounds"] == 2


def test_one_way_tls_and_tokens(pki: Path, raw_client: ModuleType) -> None:
    ours = pki / "ours"
    with FleetServer(tls=ServerTls(ours / "server.pem", ours / "server.key"), token="s3cret") as server:
        for token, kind in (("s3cret", "welcome"), ("guess", "refusal"), ("", "refusal")):
            made = channel(server, ours / "ca.pem", None)
            with raw_client.RawClient(server.address, "any", 0, channel=made, token=token) as client:
                assert client.receive(kind)
    assert server.counters.reasons["bad-token"] == 2


def test_a_refused_node_says_why(pki: Path, server: FleetServer, numpy_app: ModuleType) -> None:
    ours = pki / "ours"
    tls = ClientTls(ours / "ca.pem", ours / "site-b.pem", ours / "site-b.key")
    with pytest.raises(NodeRefused, match="site-b") as caught:
        run_node(server.address, numpy_app.echo_app(), [9], name="other", tls=tls)
    assert caught.value.reason == "wrong-name"


def test_plain_text_stays_on_this_machine(numpy_app: ModuleType) -> None:
    for address in ("0.0.0.0:0", "[::]:0", "example.org:7000"):
        with pytest.raises(ConfigError, match="insecure"):
            FleetServer(address)
    with pytest.raises(ConfigError, match="insecure"):
        run_node("192.0.2.1:7000", numpy_app.echo_app(), name="n")
    FleetServer("0.0.0.0:0", insecure=True)


def test_keys_that_others_can_read_are_refused(tmp_path: Path) -> None:
    create_authority(tmp_path)
    create_server(tmp_path, ["localhost"])
    key = tmp_path / "server.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    key.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        FleetServer(tls=ServerTls(tmp_path / "server.pem", key)).start()
    with pytest.raises(ConfigError, match="chmod 600"):
        ClientTls(tmp_path / "ca.pem", tmp_path / "server.pem", key).credentials()


def test_certificates_are_what_they_say(tmp_path: Path) -> None:
    create_authority(tmp_path)
    create_server(tmp_path, ["fl.example.org", "10.1.2.3"], days=30)
    create_client(tmp_path, "hospital.one", days=30)
    server = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.1.2.3"]
    client = x509.load_pem_x509_certificate((tmp_path / "hospital.one.pem").read_bytes())
    assert client.subject.rfc4514_string() == "CN=hospital.one"
    left = client.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=29) < left < datetime.timedelta(days=31)
    for again in (lambda: create_authority(tmp_path), lambda: create_client(tmp_path, "hospital.one")):
        with pytest.raises(ConfigError, match="exists"):
            again()
    for name in ("../x", "ca", ""):
        with pytest.raises(ConfigError, match="name"):
            create_client(tmp_path, name)
    with pytest.raises(ConfigError, match="hosts"):
        create_server(tmp_path, [], name="other")
