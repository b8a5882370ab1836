"""Text from the network, before it is logged, stored or shown."""

from __future__ import annotations

_KEPT = "\n\t"


def harmless(text: str) -> str:
    """Return ``text`` with control characters replaced: databases refuse some, terminals obey others."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter in _KEPT else "\ufffd" for letter in text)
