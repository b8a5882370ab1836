"""Who gets in with which certificate, on real sockets."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from turnout.client.node import ClientTls, NodeOptions, NodeRefused, run_node
from turnout.server.fleet import CommitCallback, FleetGrid, FleetServer, ServerTls
from turnout.server.fleet.certs import create_authority, create_client, create_server
from turnout.server.fleet.revocation import revoke_name
from turnout.strategies import FedAvg
from turnout.wire import ConfigError

pytestmark = pytest.mark.alone


def craft(
    stem: Path,
    name: str,
    authority: Path | None,
    *,
    usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
    starts: float = -1,
    ends: float = 30,
) -> None:
    """Write a pair that our own tools would not make; without an authority it signs itself. Days from now."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    signer: Any = key
    if authority is not None:
        issuer = x509.load_pem_x509_certificate((authority / "ca.pem").read_bytes()).subject
        signer = serialization.load_pem_private_key((authority / "ca.key").read_bytes(), None)
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=starts))
        .not_valid_after(now + datetime.timedelta(days=ends))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
        .sign(signer, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    stem.with_name(f"{stem.name}.pem").write_bytes(certificate.public_bytes(pem))
    path = stem.with_name(f"{stem.name}.key")
    path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    path.chmod(0o600)


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
    craft(root / "early", "site-a", root / "ours", starts=1)
    craft(root / "self-signed", "site-a", None)
    craft(root / "for-code", "site-a", root / "ours", usage=ExtendedKeyUsageOID.CODE_SIGNING)
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
        ("ours", "early", "site-a"),
        ("ours", "self-signed", "site-a"),
        ("ours", "for-code", "site-a"),
        ("ours", "ours/server", "server"),
        ("theirs", "ours/site-a", "site-a"),
    ],
    ids=[
        "no-certificate",
        "other-authority",
        "expired",
        "not-yet-valid",
        "self-signed",
        "other-usage",
        "server-certificate",
        "server-of-other-authority",
    ],
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


@pytest.mark.parametrize(
    ("version", "ciphers"),
    [
        (ssl.TLSVersion.TLSv1, "ALL:@SECLEVEL=0"),
        (ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0"),
        (ssl.TLSVersion.TLSv1_2, "AES128-SHA:AES256-SHA:@SECLEVEL=0"),
        (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES128-SHA:@SECLEVEL=0"),
        (ssl.TLSVersion.TLSv1_2, None),
        (ssl.TLSVersion.TLSv1_3, None),
    ],
)
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_old_protocols_and_weak_ciphers_are_refused(
    version: ssl.TLSVersion, ciphers: str | None, server: FleetServer, pki: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = version
    context.load_verify_locations(pki / "ours/ca.pem")
    context.load_cert_chain(pki / "ours/site-a.pem", pki / "ours/site-a.key")
    context.set_alpn_protocols(["h2"])
    if ciphers is not None:
        context.set_ciphers(ciphers)
    plain = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    if ciphers is not None:
        with plain, pytest.raises((ssl.SSLError, OSError)):
            context.wrap_socket(plain, server_hostname="localhost")
    else:
        with plain, context.wrap_socket(plain, server_hostname="localhost") as secure:
            assert secure.version() in ("TLSv1.2", "TLSv1.3")


def test_plain_text_to_a_tls_port_is_refused(server: FleetServer, raw_client: ModuleType) -> None:
    with raw_client.RawClient(server.address, "site-a", 0) as client, pytest.raises(grpc.RpcError):
        client.receive("welcome")


def test_the_name_is_bound_to_the_certificate(
    server: FleetServer, pki: Path, raw_client: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    made = channel(server, pki / "ours/ca.pem", pki / "ours/site-b")
    with raw_client.RawClient(server.address, "site-a", 0, channel=made) as thief:
        answer = next(thief.messages())
        assert answer.refusal.reason == "wrong-name", answer  # And no welcome.
        assert "site-b" in answer.refusal.detail
    made = channel(server, pki / "ours/ca.pem", pki / "ours/site-b")
    with raw_client.RawClient(server.address, "site-b", 1, channel=made) as client:
        assert list(client.receive("welcome").ids) == [1]
    assert server.counters.reasons["wrong-name"] >= 1
    events = [record for record in caplog.records if record.name == "turnout.server.fleet.security"]
    assert any("'site-a'" in event.getMessage() and "site-b" in event.getMessage() for event in events)


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


def test_one_way_tls_admits_any_name(pki: Path, raw_client: ModuleType) -> None:
    ours = pki / "ours"
    with FleetServer(tls=ServerTls(ours / "server.pem", ours / "server.key")) as server:
        made = channel(server, ours / "ca.pem", None)
        with raw_client.RawClient(server.address, "any", 0, channel=made) as client:
            assert client.receive("welcome")


def test_revocation_needs_no_restart(tmp_path: Path, raw_client: ModuleType) -> None:
    """The stream is cut, the certificate is refused from then on, and one that is issued later is good."""
    create_authority(tmp_path)
    create_server(tmp_path, ["127.0.0.1"])
    for name in ("site-a", "site-b"):
        create_client(tmp_path, name)
    tls = ServerTls(tmp_path / "server.pem", tmp_path / "server.key", tmp_path / "ca.pem")
    with FleetServer(tls=tls) as server:
        stolen = raw_client.RawClient(
            server.address, "site-a", 0, channel=channel(server, tmp_path / "ca.pem", tmp_path / "site-a")
        )
        other = raw_client.RawClient(
            server.address, "site-b", 1, channel=channel(server, tmp_path / "ca.pem", tmp_path / "site-b")
        )
        with stolen, other:
            stolen.receive("welcome")
            other.receive("welcome")
            began = time.monotonic()
            revoke_name(tmp_path, "site-a")
            assert stolen.receive("refusal").reason == "revoked"
            seconds = time.monotonic() - began
            print(f"revoked to disconnected: {seconds:.2f} s")
            assert seconds < 2
            while 0 in server.hub.connections:
                time.sleep(0.01)
            assert list(server.hub.connections) == [1]

        def hello() -> str:
            made = channel(server, tmp_path / "ca.pem", tmp_path / "site-a")
            with raw_client.RawClient(server.address, "site-a", 0, channel=made) as client:
                for message in client.messages():
                    return str(message.WhichOneof("body"))
            raise AssertionError

        assert hello() == "refusal"
        (tmp_path / "revoked.json").write_text("{")  # What was read last stays in force.
        assert hello() == "refusal"
        for suffix in ("pem", "key"):
            (tmp_path / f"site-a.{suffix}").unlink()
        time.sleep(1.1)  # Certificates count whole seconds.
        create_client(tmp_path, "site-a")
        assert hello() == "welcome"
    assert server.counters.reasons["revoked"] >= 2
    with pytest.raises(ConfigError, match=r"revoked\.json"):
        FleetServer(tls=tls)
    (tmp_path / "revoked.json").write_text('{"revoked": {"site-b": "2999-01-01T00:00:00+00:00"}}')
    with FleetServer(tls=tls) as server:
        made = channel(server, tmp_path / "ca.pem", tmp_path / "site-b")
        with raw_client.RawClient(server.address, "site-b", 1, channel=made) as client:
            assert client.receive("refusal").reason == "revoked"


def test_certificates_out_of_date_are_said_at_start(tmp_path: Path) -> None:
    create_authority(tmp_path)
    craft(tmp_path / "old", "server", tmp_path, usage=ExtendedKeyUsageOID.SERVER_AUTH, starts=-9, ends=-2)
    with pytest.raises(ConfigError, match=r"old\.pem: valid from .* to .* UTC, and it is"):
        FleetServer(tls=ServerTls(tmp_path / "old.pem", tmp_path / "old.key")).start()


def test_a_refused_node_says_why(pki: Path, server: FleetServer, numpy_app: ModuleType) -> None:
    ours = pki / "ours"
    tls = ClientTls(ours / "ca.pem", ours / "site-b.pem", ours / "site-b.key")
    with pytest.raises(NodeRefused, match="site-b") as caught:
        run_node(server.address, numpy_app.echo_app(), [9], name="other", tls=tls)
    assert caught.value.reason == "wrong-name"


def test_plain_text_stays_on_this_machine(numpy_app: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    for address in ("0.0.0.0:0", "[::]:0", "example.org:7000"):
        with pytest.raises(ConfigError, match="insecure"):
            FleetServer(address)
    with pytest.raises(ConfigError, match="insecure"):
        run_node("192.0.2.1:7000", numpy_app.echo_app(), name="n")
    with caplog.at_level(logging.WARNING), FleetServer("0.0.0.0:0", insecure=True):
        assert "plain text" in caplog.text


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


def test_keys_appear_nowhere_in_a_run(
    pki: Path, tmp_path: Path, initial: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in the most talkative logs of both sides, nor in what they write, nor in their settings."""
    ours = pki / "ours"
    # Not gRPC's own: its servers log themselves while they are destroyed, and a kept record outlives them.
    caplog.set_level(logging.DEBUG, logger="turnout")
    tls = ServerTls(ours / "server.pem", ours / "server.key", ours / "ca.pem")
    script = Path(__file__).with_name("numpy_app.py")
    pair = (ours / "site-a.pem", ours / "site-a.key")
    with FleetServer(directory=tmp_path, tls=tls) as server:
        node = subprocess.Popen(
            [sys.executable, script, server.address, "0-1", "--name", "site-a",
             "--state-dir", tmp_path / "state", "--tls", ours / "ca.pem", *pair],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "LEVEL": "DEBUG", "GRPC_VERBOSITY": "DEBUG"},
        )  # fmt: skip
        grid = FleetGrid(server, min_clients=2, wait=20)
        FedAvg().start(grid, initial(), num_rounds=2, timeout=20, callbacks=[CommitCallback(grid)])
        said = [caplog.text, repr(tls), repr(server.options), repr(server.roster.members), repr(vars(server))]
        node.terminate()
        said += node.communicate(timeout=20)
    said += [str(NodeOptions(tls=ClientTls(ours / "ca.pem", *pair)))]
    said += [f.read_bytes().decode("latin-1") for f in tmp_path.rglob("*") if f.is_file()]
    secrets = [
        line for key in ours.glob("*.key") for line in key.read_text().splitlines() if "-----" not in line
    ]
    assert len(secrets) >= 6
    assert not [line for line in secrets if any(line in text for text in said)]
