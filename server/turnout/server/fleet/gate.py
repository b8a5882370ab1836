"""Checks of a reply that need no body, or have it at hand."""

from __future__ import annotations

from turnout.server.fleet.staging import check_finite
from turnout.v1 import fleet_pb2 as pb
from turnout.wire import NDArray, keys
from turnout.wire.checksums import add_chunk
from turnout.wire.errors import ReplyRejected
from turnout.wire.replies import INLINE_BYTES, ReplyPlan
from turnout.wire.work import aligned_copy


def inline_body(ready: pb.Ready, plan: ReplyPlan) -> NDArray:
    """Return the body that came with the head, aligned and checked. Raises `ReplyRejected`."""
    if len(ready.data) != plan.size or plan.size > INLINE_BYTES:
        raise ReplyRejected("bad-size", f"{len(ready.data)} bytes came inline, announced were {plan.size}.")
    if plan.size and add_chunk(0, ready.data) != ready.checksum:
        raise ReplyRejected("damaged", "the reply's checksum does not match its bytes.")
    body = aligned_copy(ready.data)
    check_finite(body, plan.runs(), 0, plan.size)
    return body


def check_identity(plan: ReplyPlan, client: int) -> None:
    """Refuse a reply that names another client than the one its connection was enrolled as."""
    for record in plan.scalars.values():
        claimed = record.get(keys.CLIENT_ID, client)
        if claimed != client:
            raise ReplyRejected("wrong-identity", f"client {client} replied as client {claimed!r:.40}.")
