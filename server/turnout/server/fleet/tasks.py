"""One request to one client, from its offer to its outcome, and the exchange that it belongs to."""

from __future__ import annotations

import enum
import queue
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from flwr.app import Message

from turnout.server.fleet.staging import Receipt
from turnout.v1 import fleet_pb2 as pb
from turnout.wire.arrays import NDArray
from turnout.wire.flower import CLIENT_APP_RAISED, REPLY_REFUSED, error_reply, reply, stamp
from turnout.wire.packing import BlockLayout
from turnout.wire.replies import ReplyPlan
from turnout.wire.work import EncodedWork, Payload

OUTCOMES: Final = {
    "accepted": pb.OUTCOME_ACCEPTED,
    "late": pb.OUTCOME_LATE,
    "duplicate": pb.OUTCOME_DUPLICATE,
    "rejected": pb.OUTCOME_REJECTED,
    "failed": pb.OUTCOME_REJECTED,
    "retry": pb.OUTCOME_RETRY,
}


class Stage(enum.Enum):
    """How far a task has come."""

    OFFERED = enum.auto()
    WAITING = enum.auto()  # The reply is ready and waits for a slot.
    RECEIVING = enum.auto()
    DELIVERED = enum.auto()  # In the hands of the strategy.
    CLOSED = enum.auto()


@dataclass(slots=True, eq=False)
class Task:
    """One request to one client."""

    id: int
    client: int
    message: Message
    work: EncodedWork
    exchange: Exchange
    attempt: int = 0
    stage: Stage = Stage.OFFERED
    ready: pb.Ready | None = None
    plan: ReplyPlan | None = None
    receipt: Receipt | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def find_layout(self, digest: bytes) -> BlockLayout | None:
        """Return the layout of the request's records by digest."""
        for layout in self.work.layouts.values():
            if layout.digest == digest:
                return layout
        return None


@dataclass(slots=True, eq=False)
class Delivery:
    """A reply on its way to the strategy; ``error`` instead of a body when there is none to fold.

    ``outcome`` is ``"failed"`` or ``"rejected"`` then, and ``reason`` a kebab-case word.
    """

    task: Task
    plan: ReplyPlan | None = None
    body: NDArray | None = None
    error: str = ""
    reason: str = ""
    outcome: str = "failed"

    def message(self) -> Message:
        """Return the reply as Flower's strategies take it."""
        request = self.task.message
        if self.plan is None or self.error:
            refused = self.outcome == "rejected"
            answer = error_reply(request, self.error, REPLY_REFUSED if refused else CLIENT_APP_RAISED)
        else:
            receipt = self.task.receipt
            block = receipt.buffer if receipt is not None else self.body
            assert block is not None
            answer = reply(self.plan.content(block), to=request)
        stamp(answer, f"{request.metadata.message_id}-reply")
        return answer


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a delivered reply; ``tell`` when its client may know at once."""

    task: Task
    outcome: str
    reason: str
    detail: str
    tell: bool


@dataclass(slots=True, eq=False)
class Exchange:
    """The tasks of one ``send_and_receive``. The event loop fills ``inbox``, the grid's caller empties it."""

    server_round: int
    max_reply_bytes: int
    tasks: dict[int, Task] = field(default_factory=dict)
    inbox: queue.SimpleQueue[Delivery] = field(default_factory=queue.SimpleQueue)
    closed: bool = False

    def payloads(self) -> list[Payload]:
        """Return every payload that the tasks name, once."""
        seen: dict[int, Payload] = {}
        for task in self.tasks.values():
            seen.update((payload.id, payload) for payload in task.work.payloads)
        return list(seen.values())
