"""What a peer's certificate says about who it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def certificate_names(auth: Mapping[str, Sequence[bytes]]) -> set[str]:
    """Return the common name and the alternative names of the peer's certificate, if it showed one."""
    fields = ("x509_common_name", "x509_subject_alternative_name")
    return {name.decode(errors="replace") for field in fields for name in auth.get(field, ())}
