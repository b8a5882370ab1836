"""What a peer's certificate says about who it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cryptography import x509


def certificate_names(auth: Mapping[str, Sequence[bytes]]) -> set[str]:
    """Return the common name and the alternative names of the peer's certificate, if it showed one."""
    fields = ("x509_common_name", "x509_subject_alternative_name")
    return {name.decode(errors="replace") for field in fields for name in auth.get(field, ())}


def peer_certificate(auth: Mapping[str, Sequence[bytes]]) -> x509.Certificate | None:
    """Return the certificate that the peer showed and the transport has verified, None without one."""
    shown = auth.get("x509_pem_cert", ())
    return x509.load_pem_x509_certificate(shown[0]) if shown else None
