"""For whoever runs the process: is it alive, can it read its store, how is it doing."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from turnout.dashboard.errors import documented
from turnout.dashboard.services import Parts

router = APIRouter(tags=["health"])

_METRICS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "Metrics in the text format or in OpenMetrics, as the scraper asks.",
        "content": {
            "text/plain": {"schema": {"type": "string"}},
            "application/openmetrics-text": {"schema": {"type": "string"}},
        },
    }
}


@router.get("/healthz", response_class=PlainTextResponse)
async def healthz() -> str:
    """Answer as long as the process does."""
    return "ok\n"


@router.get("/readyz", response_class=PlainTextResponse, responses=documented())
def readyz(parts: Parts) -> str:
    """Answer when the store can be read; 503 otherwise."""
    parts.reader.check()
    return "ok\n"


@router.get("/metrics", responses=_METRICS, response_class=Response)
def metrics(parts: Parts, request: Request) -> Response:
    """Show the dashboard's own metrics."""
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return Response(encode(parts.telemetry.registry), headers={"Content-Type": content_type})
