"""Downloads: CSV and JSON, streamed."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Path
from starlette.responses import StreamingResponse

from turnout.dashboard.errors import documented
from turnout.dashboard.queries.export import COLUMNS, RUN_COLUMNS, Format, encoded, run_rows, table_rows
from turnout.dashboard.routes.parameters import RunId
from turnout.dashboard.services import Parts

router = APIRouter(tags=["export"])

_MEDIA: Final = {"csv": "text/csv; charset=utf-8", "json": "application/json"}
_CONTENT: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "A table: CSV with a header line, or a JSON array of objects.",
        "content": {
            "text/csv": {"schema": {"type": "string"}},
            "application/json": {"schema": {"type": "array", "items": {"type": "object"}}},
        },
    }
}
_Format = Annotated[Literal["csv", "json"], Path(description="csv or json.")]
_Table = Annotated[Literal["rounds", "metrics", "clients"], Path(description="Which table.")]


@router.get("/export/runs.{format_}", responses=_CONTENT | documented(), response_class=StreamingResponse)
def export_runs(parts: Parts, format_: _Format) -> StreamingResponse:
    """Download all runs."""
    rows = run_rows(parts.reader)
    return _download(encoded(rows, RUN_COLUMNS, format_), "runs", format_)


@router.get(
    "/runs/{run}/export/{table}.{format_}",
    responses=_CONTENT | documented(404),
    response_class=StreamingResponse,
)
def export_table(parts: Parts, run: RunId, table: _Table, format_: _Format) -> StreamingResponse:
    """Download the rounds, the metrics or the client rounds of a run."""
    rows = table_rows(parts.reader, run, table)
    return _download(encoded(rows, COLUMNS[table], format_), f"{run}-{table}", format_)


def _download(pieces: Any, name: str, format_: Format) -> StreamingResponse:
    headers = {"Content-Disposition": f'attachment; filename="{name}.{format_}"', "Cache-Control": "no-store"}
    return StreamingResponse(pieces, media_type=_MEDIA[format_], headers=headers)
