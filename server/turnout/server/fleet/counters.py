"""What a fleet server counts since its start."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class FleetCounters:
    """Plain numbers, written by the event loop and read by anyone."""

    replies: Counter[str] = field(default_factory=Counter)
    """Replies by outcome: accepted, failed, late, duplicate, rejected, retry."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Refused replies and connections by reason."""
    connects: int = 0
    disconnects: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    offers: int = 0
    lost_uploads: int = 0
