"""A node gets its first certificate with a token that works once, for one name and one key."""

from __future__ import annotations

import io
import json
import logging
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from typer.testing import CliRunner

from turnout.cli import enrol as commands
from turnout.client.node.enrol import EnrolmentFailed, enrol
from turnout.server.fleet.certs import create_authority, create_client, create_server
from turnout.server.fleet.enrolment import EnrolmentServer, FailureLimit
from turnout.server.fleet.revocation import revoke_name
from turnout.server.fleet.tokens import EnrolmentRefused, TokenBook
from turnout.v1 import fleet_pb2 as pb
from turnout.wire import ConfigError


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    directory = tmp_path / "authority"
    create_authority(directory)
    create_server(directory, ["localhost", "127.0.0.1"])
    return directory


@pytest.fixture
def server(authority: Path) -> Iterator[EnrolmentServer]:
    with EnrolmentServer("127.0.0.1:0", authority) as running:
        yield running


def request(name: str, key: object = None, subject: list[x509.NameAttribute] | None = None) -> bytes:
    key = key or ec.generate_private_key(ec.SECP256R1())
    names = subject or [x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names)).sign(key, algorithm)  # type: ignore[arg-type]
    return csr.public_bytes(serialization.Encoding.PEM)


def ask(server: EnrolmentServer, authority: Path, **fields: object) -> tuple[grpc.StatusCode, str]:
    """Send a request by hand; return how it ended."""
    credentials = grpc.ssl_channel_credentials((authority / "ca.pem").read_bytes())
    with grpc.secure_channel(server.address, credentials) as channel:
        call = channel.unary_unary("/turnout.v1.Enrolment/Enrol")
        try:
            call(pb.EnrolRequest(**fields).SerializeToString(), timeout=10)
        except grpc.RpcError as error:
            return error.code(), error.details()
    return grpc.StatusCode.OK, ""


def test_a_token_buys_one_certificate_for_a_key_made_on_the_node(
    server: EnrolmentServer, authority: Path, tmp_path: Path
) -> None:
    token = TokenBook(authority).issue("site-a", 60)
    path = enrol(server.address, "site-a", token, tmp_path / "edge", ca=authority / "ca.pem")
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((authority / "ca.pem").read_bytes()))
    assert certificate.subject.rfc4514_string() == "CN=site-a"
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.ExtendedKeyUsageOID.CLIENT_AUTH]
    key = tmp_path / "edge/site-a.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    secret = b"".join(key.read_bytes().splitlines()[1:-1])
    for file in authority.rglob("*"):
        if file.is_file():
            assert secret not in file.read_bytes().replace(b"\n", b"")
    assert (authority / "enrolled/site-a.pem").read_bytes() == path.read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        enrol(server.address, "site-a", token, tmp_path / "edge", ca=authority / "ca.pem")


def test_a_stolen_token_is_worth_nothing(server: EnrolmentServer, authority: Path, tmp_path: Path) -> None:
    token = TokenBook(authority).issue("site-a", 60)
    with pytest.raises(EnrolmentFailed) as caught:  # With another name.
        enrol(server.address, "site-b", token, tmp_path / "b", ca=authority / "ca.pem")
    assert caught.value.reason == "wrong-name"
    enrol(server.address, "site-a", token, tmp_path / "edge", ca=authority / "ca.pem")
    with pytest.raises(EnrolmentFailed) as caught:  # From elsewhere, after use.
        enrol(server.address, "site-a", token, tmp_path / "thief", ca=authority / "ca.pem")
    assert caught.value.reason == "used-token"
    assert server.enrolled == 1
    assert server.refused == 2


def test_an_answer_that_was_lost_can_be_asked_for_again(
    server: EnrolmentServer, authority: Path, tmp_path: Path
) -> None:
    token = TokenBook(authority).issue("site-a", 60)
    first = enrol(server.address, "site-a", token, tmp_path / "edge", ca=authority / "ca.pem")
    key = first.with_suffix(".key").read_bytes()
    first.unlink()  # As if it had never come.
    again = enrol(server.address, "site-a", token, tmp_path / "edge", ca=authority / "ca.pem")
    assert again.with_suffix(".key").read_bytes() == key


def test_two_thieves_at_once_get_one_certificate(
    server: EnrolmentServer, authority: Path, tmp_path: Path
) -> None:
    token = TokenBook(authority).issue("site-a", 60)
    outcomes: list[str] = []

    def attempt(number: int) -> None:
        try:
            enrol(server.address, "site-a", token, tmp_path / str(number), ca=authority / "ca.pem")
            outcomes.append("ok")
        except EnrolmentFailed as error:
            outcomes.append(error.reason)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["ok"] + ["used-token"] * 5


def test_a_token_lives_shortly(authority: Path) -> None:
    now = [1000.0]
    book = TokenBook(authority, clock=lambda: now[0])
    early, late = book.issue("a", 60), book.issue("a", 120)
    now[0] += 60
    with pytest.raises(EnrolmentRefused) as caught:
        book.redeem("a", early, "key")
    assert caught.value.reason == "expired-token"
    book.redeem("a", late, "key")
    book.redeem("a", late, "key")
    now[0] += 60
    with pytest.raises(EnrolmentRefused) as caught:  # The key that it is bound to cannot renew it for ever.
        book.redeem("a", late, "key")
    assert caught.value.reason == "expired-token"
    now[0] += 8 * 86400
    book.issue("b", 60)
    assert len(json.loads((authority / "tokens.json").read_text())["tokens"]) == 1
    for ttl in (0.0, -1.0, float("nan"), 31 * 86400.0):
        with pytest.raises(ConfigError, match="ttl"):
            book.issue("a", ttl)


def test_only_hashes_of_tokens_are_kept(authority: Path) -> None:
    tokens = [TokenBook(authority).issue("site-a", 60) for _ in range(3)]
    assert len(set(tokens)) == 3
    content = (authority / "tokens.json").read_text()
    assert not any(token in content or token.removeprefix("turnout-enrol-") in content for token in tokens)
    assert stat.S_IMODE((authority / "tokens.json").stat().st_mode) == 0o600


def test_a_crash_after_the_token_was_spent_leaves_it_spent(authority: Path) -> None:
    token = TokenBook(authority).issue("site-a", 60)
    TokenBook(authority).redeem("site-a", token, "key")
    with pytest.raises(EnrolmentRefused, match="another key"):
        TokenBook(authority).redeem("site-a", token, "other")


def test_a_damaged_book_is_named(authority: Path) -> None:
    for content in ("{", "[]", '{"tokens": [{}]}', '{"tokens": 3}', "[" * 100_000):
        (authority / "tokens.json").write_text(content)
        with pytest.raises(ConfigError, match=r"tokens\.json"):
            TokenBook(authority).issue("a", 60)


BAD: dict[str, tuple[str, Callable[[], bytes]]] = {
    "noise": ("bad-request", lambda: b"\xff" * 100),
    "empty": ("bad-request", lambda: b""),
    "other-name": ("wrong-name", lambda: request("site-b")),
    "two-names": (
        "wrong-name",
        lambda: request(
            "", subject=[x509.NameAttribute(x509.NameOID.COMMON_NAME, n) for n in ("site-a", "b")]
        ),
    ),
    "too-long": ("bad-request", lambda: request("site-a") + b"\n" * 9000),
    "short-rsa": ("weak-key", lambda: request("site-a", rsa.generate_private_key(65537, 1024))),
    "odd-curve": ("weak-key", lambda: request("site-a", ec.generate_private_key(ec.SECP192R1()))),
    "ed25519": ("weak-key", lambda: request("site-a", ed25519.Ed25519PrivateKey.generate())),
    "forged": ("bad-request", lambda: forged()),
}


def forged() -> bytes:
    """A request whose signature does not match."""
    der = bytearray(x509.load_pem_x509_csr(request("site-a")).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_signing_request_is_refused_and_spends_nothing(
    kind: str, server: EnrolmentServer, authority: Path
) -> None:
    reason, make = BAD[kind]
    token = TokenBook(authority).issue("site-a", 60)
    code, detail = ask(server, authority, name="site-a", token=token, csr=make())
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert detail.startswith(reason + ": ")
    good = ask(server, authority, name="site-a", token=token, csr=request("site-a"))
    assert good == (grpc.StatusCode.OK, "")


@pytest.mark.parametrize(
    "key", [lambda: rsa.generate_private_key(65537, 2048), lambda: ec.generate_private_key(ec.SECP384R1())]
)
def test_other_good_keys_are_signed(
    key: Callable[[], object], server: EnrolmentServer, authority: Path
) -> None:
    token = TokenBook(authority).issue("site-a", 60)
    assert (
        ask(server, authority, name="site-a", token=token, csr=request("site-a", key()))[0]
        is grpc.StatusCode.OK
    )


@pytest.mark.parametrize("name", ["ca", "../x", "", "a\nb", "x" * 65])
def test_bad_names_are_refused(name: str, server: EnrolmentServer, authority: Path) -> None:
    code, detail = ask(server, authority, name=name, token="t", csr=request("site-a"))
    assert (code, detail.partition(":")[0]) == (grpc.StatusCode.PERMISSION_DENIED, "bad-name")


def test_guessing_is_slowed_down_and_its_memory_is_bounded(server: EnrolmentServer, authority: Path) -> None:
    csr = request("site-a")
    codes = [ask(server, authority, name="site-a", token=f"guess-{i}", csr=csr)[0] for i in range(12)]
    assert codes[:10] == [grpc.StatusCode.PERMISSION_DENIED] * 10
    assert codes[10:] == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 2
    now = [0.0]
    limit = FailureLimit(2, 60, 100, clock=lambda: now[0])
    for number in range(1000):
        limit.failed(f"host-{number}")
    assert len(limit._failures) == 100
    limit.check("host-999")
    limit.failed("host-999")
    with pytest.raises(EnrolmentRefused, match="60 seconds"):
        limit.check("host-999")
    limit.check("other")
    now[0] = 61
    limit.check("host-999")


def test_requests_beyond_the_limit_are_refused_by_the_transport(
    server: EnrolmentServer, authority: Path
) -> None:
    code, _ = ask(server, authority, name="site-a", token="t", csr=bytes(17 << 10))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_node_talks_to_nobody_but_the_authoritys_server(
    server: EnrolmentServer, authority: Path, tmp_path: Path
) -> None:
    create_authority(tmp_path / "other")
    token = TokenBook(authority).issue("site-a", 60)
    with pytest.raises(EnrolmentFailed) as caught:
        enrol(server.address, "site-a", token, tmp_path / "edge", ca=tmp_path / "other/ca.pem", timeout=5)
    assert caught.value.reason == "unreachable"
    assert token not in str(caught.value)
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as plain:  # Not even by mistake.
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert not plain.recv(1000).startswith(b"\x00")
    enrol(server.address, "site-a", token, tmp_path / "edge", ca=authority / "ca.pem")


def test_revoking_a_name_voids_its_tokens(server: EnrolmentServer, authority: Path, tmp_path: Path) -> None:
    token = TokenBook(authority).issue("site-a", 60)
    revoke_name(authority, "site-a")
    with pytest.raises(EnrolmentFailed) as caught:
        enrol(server.address, "site-a", token, tmp_path / "edge", ca=authority / "ca.pem")
    assert caught.value.reason == "unknown-token"
    again = TokenBook(authority).issue("site-a", 60)
    enrol(server.address, "site-a", again, tmp_path / "edge", ca=authority / "ca.pem")


def test_an_authority_that_is_not_in_order_is_said_at_start(authority: Path, tmp_path: Path) -> None:
    (authority / "ca.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        EnrolmentServer("127.0.0.1:0", authority).start()
    (authority / "ca.key").chmod(0o600)
    with pytest.raises(ConfigError, match="cannot be used"):
        EnrolmentServer("192.0.2.7:1", authority).start()
    with pytest.raises(ConfigError, match=r"ca\.key"):
        EnrolmentServer("127.0.0.1:0", tmp_path).start()


# Commands.


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    for command in (commands.token, commands.revoke, commands.enrol):
        made.command()(command)
    return made


def test_the_commands_enrol_a_node(
    app: typer.Typer, server: EnrolmentServer, authority: Path, tmp_path: Path
) -> None:
    run = CliRunner().invoke
    issued = run(app, ["token", "site-a", "--dir", str(authority), "--ttl", "5m"])
    token = issued.stdout.strip()
    assert token.startswith("turnout-enrol-")
    assert token not in issued.stderr
    arguments = ["enrol", "--server", server.address, "--ca", str(authority / "ca.pem"), "--name", "site-a"]
    done = run(app, [*arguments, "--token-file", "-", "--dir", str(tmp_path / "edge")], input=token + "\n")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "edge/site-a.pem").exists()
    file = tmp_path / "token"
    file.write_text(token)
    file.chmod(0o644)
    late = run(app, [*arguments, "--token-file", str(file), "--dir", str(tmp_path / "thief"), "-v"])
    assert late.exit_code == 3
    assert "used-token" in late.stderr
    assert "chmod 600" in late.stderr
    assert token not in late.output + late.stderr
    assert run(app, ["revoke", "site-a", "--dir", str(authority)]).exit_code == 0
    assert "site-a" in (authority / "revoked.json").read_text()
    for wrong in (["token", "../x", "--dir", str(authority)], ["token", "a", "--dir", str(tmp_path)],
                  ["token", "a", "--dir", str(authority), "--ttl", "soon"],
                  ["revoke", "a", "--dir", str(tmp_path)]):  # fmt: skip
        assert run(app, wrong).exit_code == 2


def test_tokens_of_two_processes_are_both_kept(authority: Path) -> None:
    script = ("import sys; from turnout.server.fleet.tokens import TokenBook\n"
              "for _ in range(20): TokenBook(sys.argv[1]).issue(sys.argv[2], 60)")  # fmt: skip
    processes = [subprocess.Popen([sys.executable, "-c", script, str(authority), name]) for name in "ab"]
    assert [process.wait(30) for process in processes] == [0, 0]
    assert len(json.loads((authority / "tokens.json").read_text())["tokens"]) == 40


# Secrets.


def test_no_secret_leaks(authority: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Tokens and keys appear in no log, message, representation or traceback of an enrolment that fails and
    of one that succeeds."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    caplog.set_level(logging.DEBUG, logger="turnout")
    try:
        book = TokenBook(authority)
        token = book.issue("site-a", 60)
        texts = [repr(book), str(vars(book))]
        with EnrolmentServer("127.0.0.1:0", authority) as server:
            texts.append(repr(vars(server)))
            for name, folder in (("site-b", "b"), ("site-a", "a"), ("site-a", "thief")):
                try:
                    enrol(server.address, name, token, tmp_path / folder, ca=authority / "ca.pem")
                except EnrolmentFailed as error:
                    texts += [repr(error), str(error)]
        create_client(authority, "canary")
    finally:
        logging.getLogger().removeHandler(handler)
    time.sleep(0.1)
    said = "".join([*texts, stream.getvalue(), caplog.text])
    assert "wrong-name" in said
    secrets = [token, token[-20:]]
    for key in (tmp_path / "a/site-a.key", authority / "ca.key", authority / "server.key"):
        secrets += key.read_text().splitlines()[1:-1]
    assert not [secret for secret in secrets if secret in said]
