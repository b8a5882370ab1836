"""The dashboard as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import anyio.to_thread
from fastapi import FastAPI
from starlette.middleware.gzip import GZipMiddleware

from turnout.dashboard.access import Access
from turnout.dashboard.errors import add_handlers, documented
from turnout.dashboard.live import LiveHub
from turnout.dashboard.middleware import HostCheck, LoginCheck, RequestCount, SecurityHeaders
from turnout.dashboard.models.errors import ErrorBody
from turnout.dashboard.models.live import Bye, Hello, Resync, Update
from turnout.dashboard.pages import STATIC, add_pages
from turnout.dashboard.queries.fleet import Fleets
from turnout.dashboard.reader import StoreReader
from turnout.dashboard.routes import clients, comparison, export, health, runs, session, stream
from turnout.dashboard.services import Catalogue, Services
from turnout.dashboard.telemetry import Telemetry
from turnout.server.environment import package_version

_THREADS: Final = 4  # Queries at once: SQLite reads from memory, and a run may share the machine.
_SMALLEST_ZIPPED: Final = 1_024


def create_app(
    reader: StoreReader,
    *,
    catalogue: Catalogue,
    token: str | None = None,
    hosts: Iterable[str] | None = (),
    static: Path = STATIC,
) -> FastAPI:
    """Return the application that shows the store of ``reader``.

    Parameters
    ----------
    reader
        The store; closed with the application.
    catalogue
        Returns the methods, as `turnout methods --json` prints them.
    token
        Who has it may read; None for everyone who reaches the server.
    hosts
        Host names that the server is asked for by, beside those of loopback; None for any.
    static
        Folder of the built page.
    """
    telemetry = Telemetry()
    access, live, fleets = Access(token), LiveHub(reader, telemetry), Fleets(reader)
    reader.on_replaced = fleets.clear

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = _THREADS
        live.start()
        try:
            yield
        finally:
            reader.close()

    app = FastAPI(
        title="Turnout dashboard",
        version=package_version("turnout") or "0",
        description="Read-only API of a run store. Beyond loopback it wants a token: a session's cookie or a "
        "Bearer header.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.services = Services(reader, fleets, live, access, telemetry, catalogue)
    refused = {status: answer for status, answer in documented(401, 403, 429).items() if status != 422}
    for router in (runs.router, clients.router, comparison.router, export.router, stream.router):
        app.include_router(router, prefix="/api/v1", responses=refused)
    app.include_router(session.router, prefix="/api/v1", responses={403: refused[403]})
    app.include_router(health.router)
    add_pages(app, static)
    add_handlers(app)
    _describe_more(app)
    # The last one added is the first one passed.
    app.add_middleware(GZipMiddleware, minimum_size=_SMALLEST_ZIPPED, compresslevel=1)
    app.add_middleware(LoginCheck, access=access)
    if hosts is not None:
        app.add_middleware(HostCheck, allowed=hosts)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(RequestCount, telemetry=telemetry)
    return app


def _describe_more(app: FastAPI) -> None:
    """Put errors and live messages into the OpenAPI document: they are in no route's signature."""
    plain = app.openapi

    def described() -> dict[str, object]:
        document = plain()
        schemas = document["components"]["schemas"]
        for model in (ErrorBody, Hello, Update, Resync, Bye):
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            for name, inner in schema.pop("$defs", {}).items():
                schemas.setdefault(name, inner)
            schemas[model.__name__] = schema
        return document

    app.openapi = described  # type: ignore[method-assign]
