"""The page: built files with names that change with their content, one document for all of its views."""

from __future__ import annotations

import re
from email.utils import formatdate
from pathlib import Path
from typing import Final

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC: Final = Path(__file__).parent / "static"
#: Paths that the page itself routes.
VIEWS: Final = ("/", "/runs", "/compare", "/methods", "/clients", "/login")
_HASHED: Final = re.compile(r"[-.][A-Za-z0-9_-]{8,}\.\w+$")
_FOREVER: Final = "public, max-age=31536000, immutable"
_NOT_BUILT: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Turnout dashboard</title></head>
<body><h1>Turnout dashboard</h1>
<p>The page has not been built on this machine; the API works: <a href="/api/v1/runs">/api/v1/runs</a>,
<a href="/openapi.json">/openapi.json</a>.</p>
<p>Build it with <code>make page</code> in the repository (needs the npm registry once), or install a
released wheel, which has it inside.</p></body></html>
"""


class BuiltFiles(StaticFiles):
    """Files of the build: for ever in caches if named by content, compressed ones where they were made."""

    async def check_config(self) -> None:
        """Serve nothing, and no error, while the page has not been built."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return the file at ``path``, its ``.gz`` neighbour where the reader takes that."""
        if "\0" in path:  # No file has such a name, and asking the system for one is an error.
            path = "/"
        response = await super().get_response(path, scope)
        if response.status_code == 200 and isinstance(response, FileResponse):
            response = self._compressed(response, scope)
        if response.status_code in (200, 304):
            named = _HASHED.search(path) is not None
            response.headers["Cache-Control"] = _FOREVER if named else "no-cache"
        return response

    def _compressed(self, response: FileResponse, scope: Scope) -> FileResponse:
        zipped = Path(f"{response.path}.gz")
        response.headers["Vary"] = "Accept-Encoding"
        if "gzip" not in Headers(scope=scope).get("accept-encoding", "") or not zipped.is_file():
            return response
        return FileResponse(
            zipped,
            media_type=response.media_type,
            headers={
                "Content-Encoding": "gzip",
                "Vary": "Accept-Encoding",
                "Last-Modified": formatdate(zipped.stat().st_mtime, usegmt=True),
            },
        )


def add_pages(app: FastAPI, folder: Path = STATIC) -> None:
    """Serve the built page from ``folder``; a plain page that says how to build it, while there is none."""

    def view(_: Request) -> Response:
        index = folder / "index.html"
        if not index.is_file():
            return HTMLResponse(_NOT_BUILT, headers={"Cache-Control": "no-store"})
        return FileResponse(index, media_type="text/html", headers={"Cache-Control": "no-cache"})

    for path in VIEWS:
        app.add_api_route(path, view, include_in_schema=False, methods=["GET", "HEAD"])
        if path != "/":
            app.add_api_route(f"{path}/{{rest:path}}", view, include_in_schema=False, methods=["GET", "HEAD"])
    app.mount("/", BuiltFiles(directory=folder, check_dir=False), name="static")
