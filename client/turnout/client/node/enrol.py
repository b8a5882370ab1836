"""A node's first certificate: it makes its own key, and a one-use token has the server sign it."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any, Final, NoReturn

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from turnout.v1 import fleet_pb2 as pb
from turnout.wire.errors import ConfigError, TurnoutError
from turnout.wire.pem import read_certificate, read_key

_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_METHOD: Final = "/turnout.v1.Enrolment/Enrol"
_MAX_TOKEN_FILE: Final = 4096


class EnrolmentFailed(TurnoutError):  # noqa: N818 - the server's answer
    """The server cannot be reached, refuses, or answers nonsense. ``reason`` is a kebab-case word."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"no certificate ({reason}): {detail}")
        self.reason = reason


def enrol(
    address: str,
    name: str,
    token: str,
    directory: str | Path,
    *,
    ca: str | Path,
    server_name: str | None = None,
    timeout: float = 30.0,
) -> Path:
    """Fetch a certificate for ``name`` from the enrolment port at ``address``; return the certificate's path.

    Writes ``NAME.key``, ``NAME.pem`` and ``ca.pem`` to ``directory``. The key is made here and stays here;
    one that an earlier attempt left is used again, because the token is bound to it. ``ca`` is the authority
    that must have signed the server's certificate: get it by another way than the network.

    Raises
    ------
    ConfigError
        For files that cannot be read or written, and when there is a certificate already.
    EnrolmentFailed
        When there is no certificate in the end.
    """
    directory = Path(directory)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name={name!r}: use 1 to 64 letters, digits, '.', '_' or '-'.")
    authority = read_certificate(ca)
    certificate_path, key_path = directory / f"{name}.pem", directory / f"{name}.key"
    if certificate_path.exists():
        raise ConfigError(f"{certificate_path} exists; remove it and its key to enrol {name!r} anew.")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    key = _own_key(key_path)
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    request = pb.EnrolRequest(name=name, token=token, csr=csr.public_bytes(serialization.Encoding.PEM))
    response = _ask(address, request, authority, server_name, timeout)
    _check(response.certificate, key, subject, authority)
    # The authority first: a certificate that is there means that everything is.
    if not (directory / "ca.pem").exists():
        _write(directory / "ca.pem", authority, 0o644)
    _write(certificate_path, response.certificate, 0o644)
    return certificate_path


def read_token(path: str | Path) -> str:
    """Return the token that a file holds. Raises `ConfigError` when it holds none."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_TOKEN_FILE + 1)
    except OSError as error:
        raise ConfigError(f"token file {path}: {error.strerror or error}.") from error
    return clean_token(content, str(path))


def clean_token(content: bytes, source: str) -> str:
    """Return the token in ``content``, without the line's end. The error does not show it."""
    token = content.strip()
    if not token or len(content) > _MAX_TOKEN_FILE or not token.isascii() or len(token.split()) > 1:
        raise ConfigError(f"token file {source}: must hold the one line that turnout certs token printed.")
    return token.decode()


def _own_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key in ``path``, made on first use."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = ec.generate_private_key(ec.SECP256R1())
        content = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _write(path, content, 0o600)
        return key
    try:
        kept: Any = serialization.load_pem_private_key(read_key(path), None)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"private key {path}: not readable; remove it to make a new one.") from error
    if not isinstance(kept, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"private key {path}: is no elliptic-curve key; remove it to make a new one.")
    return kept


def _ask(
    address: str, request: pb.EnrolRequest, authority: bytes, server_name: str | None, timeout: float
) -> pb.EnrolResponse:
    settings: list[tuple[str, Any]] = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", 64 << 10),
    ]
    if server_name is not None:
        settings.append(("grpc.ssl_target_name_override", server_name))
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(authority), settings) as channel:
        call = channel.unary_unary(
            _METHOD,
            request_serializer=pb.EnrolRequest.SerializeToString,
            response_deserializer=pb.EnrolResponse.FromString,
        )
        try:
            response: pb.EnrolResponse = call(request, timeout=timeout)
        except grpc.RpcError as error:
            _explain(address, error)
    return response


def _explain(address: str, error: Any) -> NoReturn:
    code, detail = error.code(), str(error.details())
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED) and ": " in detail:
        reason, _, detail = detail.partition(": ")
        raise EnrolmentFailed(reason, f"{address} refuses: {detail}") from None
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        raise EnrolmentFailed(
            "unreachable",
            f"{address} cannot be reached or is not who the authority's certificate says: {detail}",
        ) from None
    raise EnrolmentFailed(
        "failed", f"{address} answers {code.name}: {detail}; is it an enrolment port?"
    ) from None


def _check(content: bytes, key: ec.EllipticCurvePrivateKey, subject: x509.Name, authority: bytes) -> None:
    """Take nothing for granted that the server sent."""
    try:
        certificate = x509.load_pem_x509_certificate(content)
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
        ours = certificate.public_key() == key.public_key() and certificate.subject == subject
    except (ValueError, TypeError, InvalidSignature) as error:
        raise EnrolmentFailed(
            "bad-answer", "the certificate is not one that the authority signed."
        ) from error
    if not ours:
        raise EnrolmentFailed("bad-answer", "the certificate is for another name or key.")


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write ``path`` whole, synced, or not at all; what exists is never replaced."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(mode)
            os.link(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written, {error.strerror or error}.") from error
