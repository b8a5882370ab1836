"""How long certificates are still good, for whoever watches; needs ``prometheus_client``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cryptography import x509
from prometheus_client import CollectorRegistry, Gauge

from turnout.wire.errors import ConfigError
from turnout.wire.pem import read_certificate


def watch_certificates(registry: CollectorRegistry, certificates: Mapping[str, Path]) -> None:
    """Add ``turnout_certificate_expiry_timestamp_seconds{certificate}`` to ``registry``.

    ``certificates`` are PEM files by what they are for: ``"ca"``, ``"server"``, ``"node"``. They are read
    now: a process goes on with the certificates that it started with. Raises `ConfigError` for a file that
    holds none.
    """
    expiry = Gauge(
        "turnout_certificate_expiry_timestamp_seconds",
        "Unix time at which a certificate that this process uses expires.",
        ("certificate",),
        registry=registry,
    )
    for kind, path in certificates.items():
        try:
            certificate = x509.load_pem_x509_certificate(read_certificate(path))
        except ValueError as error:
            raise ConfigError(f"{path} is no certificate: {error}") from error
        expiry.labels(kind).set(certificate.not_valid_after_utc.timestamp())
