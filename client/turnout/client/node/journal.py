"""What a client remembers of its rounds: its state after each, and the reply that goes with it.

The server says of which round it last accepted this client's reply; the client goes on from its state of
then. So a task that is done twice (a crash, a lost acknowledgement, a server that went back to a checkpoint)
changes the state once. State and reply of a round are one file, written whole or not at all.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flwr.app import RecordDict

from turnout.v1 import fleet_pb2 as pb
from turnout.wire.checkpoint import load_checkpoint, save_checkpoint
from turnout.wire.errors import CheckpointError
from turnout.wire.record_tree import decode_records, encode_records

log = logging.getLogger("turnout.client.node")

_FILE: Final = re.compile(r"round-(\d+)\.safetensors")


@dataclass(slots=True)
class Entry:
    """One finished round: the request's digest, the round it started from, the state after it, the reply."""

    digest: str
    base_round: int
    state: RecordDict
    reply: RecordDict | None


class ClientJournal:
    """The rounds of one client of one run; in ``directory``, or in memory when None.

    ``always`` also writes rounds of clients without state, so that their replies outlive the process.
    """

    def __init__(self, directory: Path | None, *, always: bool = False) -> None:
        self._directory = directory
        self._always = always
        self._entries: dict[int, Entry | None] = {}  # None: on disk, not read yet.
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            for path in directory.iterdir():
                if match := _FILE.fullmatch(path.name):
                    self._entries[int(match[1])] = None
                elif path.name.endswith(".partial"):
                    path.unlink(missing_ok=True)

    def state(self, base_round: int) -> RecordDict:
        """Return the state after ``base_round`` (0: an empty one); the newest before it when that is lost."""
        for server_round in sorted((r for r in self._entries if 0 < r <= base_round), reverse=True):
            entry = self._read(server_round)
            if entry is not None:
                if server_round < base_round:
                    log.info(
                        "no state of round %s is kept; that of round %s is used.", base_round, server_round
                    )
                return entry.state
        return RecordDict()

    def reply(self, server_round: int, digest: str, base_round: int) -> RecordDict | None:
        """Return the kept reply to the same request from the same state, if there is one."""
        entry = self._read(server_round) if server_round in self._entries else None
        if entry is None or (entry.digest, entry.base_round) != (digest, base_round):
            return None
        return entry.reply

    def commit(self, server_round: int, entry: Entry, *, keep_round: int) -> None:
        """Keep a finished round, durably if it must be; forget what no server will ask for again."""
        if self._directory is not None and (self._always or entry.state or self._has_file(entry.base_round)):
            tree = {
                "round": server_round,
                "base": entry.base_round,
                "digest": entry.digest,
                "state": encode_records(entry.state),
                "reply": None if entry.reply is None else encode_records(entry.reply),
            }
            save_checkpoint(self._path(server_round), tree)
        elif self._directory is not None:
            self._path(server_round).unlink(missing_ok=True)  # Of a server that has gone back since.
        self._entries[server_round] = entry
        keep_round = min(keep_round, entry.base_round)
        oldest = max((r for r in self._entries if r <= keep_round), default=0)
        for known in list(self._entries):
            # Rounds after the base were not accepted, or a server that went back has undone them.
            if known < oldest or (known > entry.base_round and known != server_round):
                self._forget(known)

    def accepted(self, server_round: int) -> None:
        """Let go of the reply in memory: the server has it for good."""
        entry = self._entries.get(server_round)
        if entry is not None:
            entry.reply = None

    def _has_file(self, server_round: int) -> bool:
        return self._directory is not None and server_round > 0 and self._path(server_round).exists()

    def _read(self, server_round: int) -> Entry | None:
        entry = self._entries.get(server_round)
        if entry is not None:
            return entry
        try:
            tree = load_checkpoint(self._path(server_round))
            reply = None if tree["reply"] is None else decode_records(tree["reply"])
            state = decode_records(tree["state"])
            entry = Entry(str(tree["digest"]), int(tree["base"]), state, reply)
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            log.error("state of round %s is lost: %s", server_round, error)
            return None
        self._entries[server_round] = entry
        return entry

    def _forget(self, server_round: int) -> None:
        del self._entries[server_round]
        if self._directory is not None:
            self._path(server_round).unlink(missing_ok=True)

    def _path(self, server_round: int) -> Path:
        assert self._directory is not None
        return self._directory / f"round-{server_round:08d}.safetensors"


def request_digest(work: pb.Work) -> str:
    """Return a digest of what is asked, which an equal request of a restarted server has too."""
    if not any(record.arrays.payload for record in work.records):
        return hashlib.sha256(work.SerializeToString(deterministic=True)).hexdigest()
    same = pb.Work()
    same.CopyFrom(work)
    for record in same.records:  # Numbered anew by each server; the checksum stays.
        if record.arrays.payload:
            record.arrays.payload = 0
    return hashlib.sha256(same.SerializeToString(deterministic=True)).hexdigest()


OpenJournal = Callable[[str, int], ClientJournal]


def journals(state_dir: str | Path | None, *, always: bool) -> OpenJournal:
    """Return how to open the journal of (run, client)."""

    def open_journal(run: str, client: int) -> ClientJournal:
        if state_dir is None:
            return ClientJournal(None)
        # The run's name comes from the network and must not become a path.
        folder = re.sub(r"[^A-Za-z0-9_-]", "_", run)[:64] + "-" + hashlib.sha256(run.encode()).hexdigest()[:8]
        return ClientJournal(Path(state_dir) / folder / f"client-{client}", always=always)

    return open_journal
