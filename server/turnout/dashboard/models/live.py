"""What the live stream sends."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from turnout.dashboard.models.fields import Document
from turnout.dashboard.models.rounds import EventItem, RoundItem
from turnout.dashboard.models.runs import RunSummary


class Hello(Document):
    """First message of a stream."""

    version: str
    server_time: datetime
    runs: list[str] = Field(description="The runs that this stream follows; empty for the run list.")


class NewRounds(Document):
    """Rounds of one run that were committed since the message before, with their metrics."""

    run: str
    items: list[RoundItem]
    more: bool = Field(description="Whether further rounds follow in the next message.")


class Update(Document):
    """Everything that is new, in one message; the newest state of a run wins."""

    runs: list[RunSummary]
    rounds: list[NewRounds]
    events: list[EventItem]


class Resync(Document):
    """The stream went on without some messages: load these runs again (all that is shown, if empty)."""

    runs: list[str]
    reason: Literal["behind", "rewound", "unknown-cursor"]


class Bye(Document):
    """Last message of a stream that the server ends."""

    reason: Literal["shutdown", "store-gone"]
