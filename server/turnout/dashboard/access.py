"""Who may read: a token, the sessions that it opened, and how often one may guess."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Final

from turnout.wire import ConfigError

COOKIE: Final = "turnout_session"
SESSION_SECONDS: Final = 12 * 3600
_SESSIONS: Final = 1_000
_ADDRESSES: Final = 10_000
_GUESSES: Final = 5
_WINDOW_SECONDS: Final = 60.0
_SHORTEST_TOKEN: Final = 16
_LONGEST_TOKEN: Final = 512


def new_token() -> str:
    """Return a token of 256 random bits."""
    return secrets.token_urlsafe(32)


def read_token(path: Path) -> str:
    """Return the token in ``path``: one line that only its owner may read.

    Raises `ConfigError` when it cannot be read, others may read it, or it is too short to be safe.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(4 * _LONGEST_TOKEN)
    except OSError as error:
        raise ConfigError(f"--token-file {path}: {error.strerror or error}.") from error
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise ConfigError(
            f"--token-file {path} may be read by others (mode {stat.S_IMODE(mode):04o}); "
            f"run: chmod 600 {path}"
        )
    try:
        token = content.decode().strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--token-file {path} is not text.") from error
    if not _SHORTEST_TOKEN <= len(token) <= _LONGEST_TOKEN or not token.isprintable():
        raise ConfigError(
            f"--token-file {path} must hold one line of {_SHORTEST_TOKEN} to {_LONGEST_TOKEN} characters; "
            f"make one with: (umask 077; openssl rand -base64 32 > {path})"
        )
    return token


class Access:
    """Checks tokens and sessions. Without a token everyone may read."""

    def __init__(self, token: str | None) -> None:
        self._token = None if token is None else _digest(token)
        self._lock = threading.Lock()
        self._sessions: OrderedDict[bytes, float] = OrderedDict()
        self._guesses: OrderedDict[str, list[float]] = OrderedDict()

    @property
    def required(self) -> bool:
        """Whether one has to log in."""
        return self._token is not None

    def open_session(self) -> str:
        """Return a new session's secret; the oldest of a thousand sessions ends for it."""
        session = secrets.token_urlsafe(32)
        with self._lock:
            self._sessions[_digest(session)] = time.monotonic() + SESSION_SECONDS
            while len(self._sessions) > _SESSIONS:
                self._sessions.popitem(last=False)
        return session

    def close_session(self, session: str) -> None:
        """End a session, if there is one of that secret."""
        with self._lock:
            self._sessions.pop(_digest(session), None)

    def has_session(self, session: str | None) -> bool:
        """Return whether ``session`` is the secret of a session that has not run out."""
        if not session:
            return False
        key = _digest(session)  # What is looked up is the digest, so timing tells nothing of the secret.
        with self._lock:
            ends = self._sessions.get(key)
            if ends is not None and ends < time.monotonic():
                del self._sessions[key]
                ends = None
        return ends is not None

    def matches(self, token: str) -> bool:
        """Return whether ``token`` is the token, in a time that does not depend on where it differs."""
        return self._token is not None and hmac.compare_digest(self._token, _digest(token))

    def wait_seconds(self, address: str) -> float:
        """Return for how long ``address`` may not guess again; 0 when it may."""
        now = time.monotonic()
        with self._lock:
            recent = [moment for moment in self._guesses.get(address, ()) if moment > now - _WINDOW_SECONDS]
            if not recent:
                self._guesses.pop(address, None)
                return 0.0
            self._guesses[address] = recent
            return 0.0 if len(recent) < _GUESSES else recent[-_GUESSES] + _WINDOW_SECONDS - now

    def note_failure(self, address: str) -> None:
        """Count a wrong guess of ``address``."""
        with self._lock:
            self._guesses.setdefault(address, []).append(time.monotonic())
            self._guesses.move_to_end(address)
            while len(self._guesses) > _ADDRESSES:
                self._guesses.popitem(last=False)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
