"""Addresses: who can reach them."""

from __future__ import annotations

import ipaddress


def is_loopback(address: str) -> bool:
    """Return whether ``host:port`` can only be reached from this machine."""
    host = address.rpartition(":")[0].strip("[]")
    if address.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
