"""Logging in and out, and what this server is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import APIRouter, Cookie, Request, Response
from starlette.exceptions import HTTPException

import turnout.server.history
from turnout.dashboard.access import COOKIE, SESSION_SECONDS
from turnout.dashboard.errors import documented
from turnout.dashboard.middleware import is_authenticated, remote_address, same_origin
from turnout.dashboard.models.comparison import Info, Login, Session
from turnout.dashboard.queries.runs import server_time
from turnout.dashboard.services import Parts
from turnout.server.environment import package_version
from turnout.server.history import OUTCOMES

router = APIRouter(tags=["session"])

_PALETTE: Final = Path(turnout.server.history.__file__).with_name("palette.json")


@router.get("/info", responses=documented())
def show_info(parts: Parts) -> Info:
    """Say what serves this."""
    palette: dict[str, Any] = json.loads(_PALETTE.read_text(encoding="utf-8"))
    return Info(
        version=package_version("turnout") or "",
        store=parts.reader.name,
        read_only=True,
        login_required=parts.access.required,
        server_time=server_time(),
        outcomes=list(OUTCOMES),
        palette=palette,
    )


@router.get("/session", responses=documented())
def show_session(parts: Parts, request: Request) -> Session:
    """Say whether the reader is logged in, and whether one has to be."""
    return Session(required=parts.access.required, authenticated=is_authenticated(parts.access, request))


@router.post("/session", status_code=204, responses=documented(400, 401, 403, 413, 429))
def log_in(parts: Parts, request: Request, login: Login) -> Response:
    """Log in with the token: sets a cookie that scripts cannot read. Five wrong guesses cost a minute."""
    if not same_origin(request):
        raise HTTPException(403, "the request comes from another site.")
    address = remote_address(request)
    wait = parts.access.wait_seconds(address)
    if wait > 0:
        parts.telemetry.logins.labels("limited").inc()
        raise HTTPException(
            429, "too many wrong tokens; wait a minute.", {"Retry-After": str(math.ceil(wait))}
        )
    response = Response(status_code=204)
    if not parts.access.required:
        return response
    if not parts.access.matches(login.token):
        parts.access.note_failure(address)
        parts.telemetry.logins.labels("refused").inc()
        raise HTTPException(401, "the token is wrong.", {"WWW-Authenticate": "Bearer"})
    parts.telemetry.logins.labels("accepted").inc()
    response.set_cookie(
        COOKIE,
        parts.access.open_session(),
        max_age=SESSION_SECONDS,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
        path="/",
    )
    return response


@router.delete("/session", status_code=204, responses=documented(403))
def log_out(
    parts: Parts, request: Request, session: Annotated[str | None, Cookie(alias=COOKIE)] = None
) -> Response:
    """Log out: ends the session everywhere."""
    if not same_origin(request):
        raise HTTPException(403, "the request comes from another site.")
    if session:
        parts.access.close_session(session)
    response = Response(status_code=204)
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return response
