"""What every request passes: headers, the host that was asked for, the login, the count."""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turnout.dashboard.access import COOKIE, Access
from turnout.dashboard.errors import error_response
from turnout.dashboard.telemetry import Telemetry

_POLICY: Final = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
#: Answered without a login; everything else under these prefixes needs one.
_OPEN: Final = ("/healthz", "/readyz", "/metrics", "/api/v1/session")
_GUARDED: Final = ("/api/", "/openapi.json")
_LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")
_HOST: Final = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]/@]+))(?::\d+)?")
_API: Final = "/api/v1"
_LARGEST_BODY: Final = 4_096


class SecurityHeaders:
    """Adds the headers that keep a browser from running or showing what is not ours."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                if scope["path"].startswith(_GUARDED):
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self.app(scope, receive, add)


class HostCheck:
    """Refuses other host names than ``allowed``, which a page of another site could have pointed here."""

    def __init__(self, app: ASGIApp, allowed: Iterable[str]) -> None:
        self.app = app
        self.allowed = frozenset(name.lower() for name in (*_LOCAL_NAMES, *allowed))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and host_name(Headers(scope=scope).get("host", "")) not in self.allowed:
            response = error_response(403, "this host name is not one of the dashboard's; use localhost.")
            await response(scope, receive, send)
            return
        await self.app(scope, receive, send)


class LoginCheck:
    """Lets only who is logged in, or brings the token, to the data; bodies are small."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        refusal = None
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > _LARGEST_BODY or "transfer-encoding" in request.headers:
            refusal = error_response(
                413, f"a body may have {_LARGEST_BODY} bytes, and must say how many it has."
            )
        elif scope["path"].startswith(_GUARDED) and scope["path"] not in _OPEN:
            wait = self.access.wait_seconds(remote_address(request)) if _bearer(request) else 0.0
            if wait > 0:
                refusal = error_response(
                    429, "too many wrong tokens; wait a minute.", headers={"Retry-After": str(int(wait) + 1)}
                )
            elif not is_authenticated(self.access, request):
                if _bearer(request):
                    self.access.note_failure(remote_address(request))
                refusal = error_response(
                    401, "log in with the token first.", headers={"WWW-Authenticate": "Bearer"}
                )
        await (self.app if refusal is None else refusal)(scope, receive, send)


class RequestCount:
    """Counts answers by route and status, and how long they took."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self.app, self.telemetry = app, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, stream = time.perf_counter(), 500, False

        async def note(message: Message) -> None:
            nonlocal status, stream
            if message["type"] == "http.response.start":
                status = message["status"]
                stream = (
                    Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
                )
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            if scope["path"].startswith(_API) and not route.startswith(_API):
                route = _API + route  # Routers know their routes without their prefix.
            self.telemetry.requests.labels(route, str(status)).inc()
            if not stream:
                self.telemetry.seconds.labels(route).observe(time.perf_counter() - began)


def is_authenticated(access: Access, request: HTTPConnection) -> bool:
    """Return whether the request may see data: no login is needed, it has a session, or brings the token."""
    if not access.required or access.has_session(request.cookies.get(COOKIE)):
        return True
    token = _bearer(request)
    return bool(token) and access.matches(token)


def remote_address(request: HTTPConnection) -> str:
    """Return the address that guesses are counted by: of IPv6 the network, as one host has many."""
    host = request.client.host if request.client is not None else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host[:64]
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address)


def same_origin(request: HTTPConnection) -> bool:
    """Return whether a browser sent this from our own page; other programs send no origin."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = request.headers.get("origin")
    if origin is None:
        return True
    try:
        return urlsplit(origin).netloc.lower() == request.headers.get("host", "").lower()
    except ValueError:
        return False


def host_name(host: str) -> str:
    """Return the name in a Host header without its port, in lower case; "" for what is no such header."""
    found = _HOST.fullmatch(host.strip().lower())
    return "" if found is None else found[1] or found[2]


def _bearer(request: HTTPConnection) -> str:
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""
