"""Enrolment: a node that has a token and a key of its own gets its certificate."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import NameOID

from turnout.server.fleet.certs import check_name, sign_client
from turnout.server.fleet.private_files import write_file
from turnout.server.fleet.tls import ServerTls
from turnout.server.fleet.tokens import EnrolmentRefused, TokenBook
from turnout.v1 import fleet_pb2 as pb
from turnout.v1 import fleet_pb2_grpc as rpc
from turnout.wire.errors import ConfigError
from turnout.wire.pem import read_certificate, read_key

log = logging.getLogger("turnout.server.fleet.security")

ENROLLED: Final = "enrolled"
"""Folder beside the authority with the last certificate that each node has fetched."""
_MAX_MESSAGE: Final = 16 << 10
_MAX_TOKEN: Final = 128
_MAX_CSR: Final = 8 << 10
_HASHES: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_CURVES: Final = ("secp256r1", "secp384r1")
_RSA_BITS: Final = range(2048, 4097)
_CHANNEL: Final = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.server_handshake_timeout_ms", 5000),
    ("grpc.max_connection_idle_ms", 15_000),
    ("grpc.max_connection_age_ms", 60_000),
    ("grpc.max_concurrent_streams", 2),
    ("grpc.so_reuseport", 0),
)


class FailureLimit:
    """Refuses a host after ``most`` failures within ``seconds``; remembers at most ``hosts`` of them."""

    def __init__(
        self,
        most: int = 10,
        seconds: float = 60.0,
        hosts: int = 1024,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most, self._seconds, self._hosts = most, seconds, hosts
        self._clock = clock
        self._failures: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def check(self, host: str) -> None:
        """Raise `EnrolmentRefused` when ``host`` has failed too often lately."""
        began, count = self._failures.get(host, (0.0, 0))
        left = began + self._seconds - self._clock()
        if count >= self._most and left > 0:
            raise EnrolmentRefused("too-many-attempts", f"come back in {left:.0f} seconds.")

    def failed(self, host: str) -> None:
        """Count a failure of ``host``."""
        now = self._clock()
        began, count = self._failures.pop(host, (now, 0))
        self._failures[host] = (now, 1) if now - began >= self._seconds else (began, count + 1)
        while len(self._failures) > self._hosts:
            self._failures.popitem(last=False)


class EnrolmentServer(rpc.EnrolmentServicer):
    """Signs nodes' keys on ``address`` with the authority in ``directory``, from `start` to `stop`.

    The port shows the server's certificate and asks for none; what it answers to is a token of
    ``directory/tokens.json``.

    Parameters
    ----------
    address
        ``host:port``; port 0 for any free one, see `port`.
    directory
        Holds ``ca.pem`` and ``ca.key``, and ``server.pem`` and ``server.key`` unless ``tls`` names others.
    days
        Life of the certificates that are signed.

    Raises
    ------
    ConfigError
        From `start`: unreadable files, loose permissions of a key, an address that cannot be used.
    """

    def __init__(
        self, address: str, directory: str | Path, *, tls: ServerTls | None = None, days: float = 825
    ) -> None:
        self._address = address
        self._directory = Path(directory)
        self._days = days
        pair = tls or ServerTls(self._directory / "server.pem", self._directory / "server.key")
        self._tls = ServerTls(pair.certificate, pair.key)  # One-way: the node has no certificate yet.
        self._book = TokenBook(self._directory)
        self._limit = FailureLimit()
        self._server: grpc.Server | None = None
        self.port = 0
        self.enrolled = 0
        self.refused = 0

    def start(self) -> EnrolmentServer:
        """Listen and return."""
        read_key(self._directory / "ca.key")
        read_certificate(self._directory / "ca.pem")
        credentials = self._tls.credentials()
        # Enough for people who enrol machines; more at once are told to come back.
        server = grpc.server(ThreadPoolExecutor(2), options=_CHANNEL, maximum_concurrent_rpcs=16)
        rpc.add_EnrolmentServicer_to_server(self, server)  # type: ignore[no-untyped-call]
        try:
            self.port = server.add_secure_port(self._address, credentials)
        except RuntimeError as error:
            raise ConfigError(f"enrolment address={self._address!r} cannot be used: {error}") from error
        server.start()
        self._server = server
        log.info("enrolment listens on %s", self.address)
        return self

    def stop(self) -> None:
        """Finish the request under way and close the port."""
        if self._server is not None:
            self._server.stop(1.0).wait()
            self._server = None

    @property
    def address(self) -> str:
        """Where enrolment listens, with the real port."""
        return f"{self._address.rpartition(':')[0]}:{self.port}"

    def __enter__(self) -> EnrolmentServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def Enrol(self, request: pb.EnrolRequest, context: grpc.ServicerContext) -> pb.EnrolResponse:  # noqa: N802
        """Answer one node, or end its call with the reason."""
        host = context.peer().rpartition(":")[0]
        try:
            self._limit.check(host)
            response = self._enrol(request)
        except EnrolmentRefused as refused:
            self.refused += 1
            self._limit.failed(host)
            # Never the token, not even a part of it.
            log.warning("enrolment of %.64r from %s refused, %s", request.name,
                        context.peer(), refused.reason)  # fmt: skip
            limited = refused.reason == "too-many-attempts"
            code = grpc.StatusCode.RESOURCE_EXHAUSTED if limited else grpc.StatusCode.PERMISSION_DENIED
            context.abort(code, f"{refused.reason}: {refused}")
        except ConfigError as error:
            log.error("enrolment cannot work: %s", error)
            context.abort(grpc.StatusCode.UNAVAILABLE, "the server cannot sign now; its log says why.")
        self.enrolled += 1
        log.info("%r enrolled from %s", request.name, context.peer())
        return response

    def _enrol(self, request: pb.EnrolRequest) -> pb.EnrolResponse:
        try:
            check_name(request.name)
        except ConfigError as error:
            raise EnrolmentRefused(
                "bad-name", "a name has 1 to 64 letters, digits, '.', '_' or '-'."
            ) from error
        if len(request.token) > _MAX_TOKEN:
            raise EnrolmentRefused("unknown-token", "that is no token.")
        key = requested_key(request.csr, request.name)
        public = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        digest = hashes.Hash(hashes.SHA256())
        digest.update(public)
        # Durable before anything is signed: a crash in between costs the answer, not the one use.
        self._book.redeem(request.name, request.token, digest.finalize().hex())
        certificate = sign_client(self._directory, request.name, key, days=self._days)
        folder = self._directory / ENROLLED
        folder.mkdir(mode=0o755, exist_ok=True)
        write_file(folder / f"{request.name}.pem", certificate, mode=0o644)
        return pb.EnrolResponse(
            certificate=certificate, authority=read_certificate(self._directory / "ca.pem")
        )


def requested_key(csr: bytes, name: str) -> CertificatePublicKeyTypes:
    """Return the public key of a PEM signing request. Raises `EnrolmentRefused` for one that is not in order.

    Nothing of the request but its key gets into the certificate.
    """
    if len(csr) > _MAX_CSR:
        raise EnrolmentRefused("bad-request", f"the signing request is longer than {_MAX_CSR} bytes.")
    try:
        request = x509.load_pem_x509_csr(csr)
        key = request.public_key()
        # Before the signature is looked at: verifying one by a huge key is work that a stranger could order.
        if isinstance(key, ec.EllipticCurvePublicKey):
            good = key.curve.name in _CURVES
        else:
            good = isinstance(key, rsa.RSAPublicKey) and key.key_size in _RSA_BITS
        if not good or not isinstance(request.signature_hash_algorithm, _HASHES):
            raise EnrolmentRefused(
                "weak-key", "use an elliptic-curve key (P-256, P-384) or RSA of 2048 to 4096 bits, and SHA-2."
            )
        subject: list[Any] = [(attribute.oid, attribute.value) for attribute in request.subject]
        signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise EnrolmentRefused("bad-request", "the signing request cannot be read.") from error
    if subject != [(NameOID.COMMON_NAME, name)]:
        raise EnrolmentRefused("wrong-name", f"the signing request is not for {name!r} alone.")
    if not signed:
        raise EnrolmentRefused("bad-request", "the signing request is not signed by its own key.")
    return key
