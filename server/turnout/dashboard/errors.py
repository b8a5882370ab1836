"""How errors become answers: one shape, no traceback, no path."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from turnout.dashboard.models.errors import ErrorBody, ErrorCode, ErrorDetail, FieldError
from turnout.dashboard.queries.clients import UnknownClient
from turnout.dashboard.queries.fairness import UnknownMetric
from turnout.dashboard.queries.runs import UnknownRun
from turnout.server.errors import StoreError

_log = logging.getLogger(__name__)
_MOST_FIELDS: Final = 20
_MESSAGE_CHARACTERS: Final = 300
_CODES: Final[dict[int, ErrorCode]] = {
    401: "not-logged-in",
    403: "forbidden",
    404: "not-found",
    405: "method-not-allowed",
    413: "too-large",
    422: "invalid",
    429: "too-many",
    500: "internal",
    503: "store-gone",
}


def error_response(
    status: int,
    message: str,
    *,
    fields: list[FieldError] | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """Return the answer for an error."""
    detail = ErrorDetail(code=_CODES.get(status, "bad-request"), message=message, fields=fields or [])
    return JSONResponse(ErrorBody(error=detail).model_dump(), status, headers)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what the OpenAPI document says of errors: JSON, whatever the route answers otherwise."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": content}
        for status in (*statuses, 422, 503)
    }


def add_handlers(app: FastAPI) -> None:
    """Let ``app`` answer every error in one shape."""

    @app.exception_handler(UnknownRun)
    @app.exception_handler(UnknownClient)
    @app.exception_handler(UnknownMetric)
    def unknown(_: Request, error: Exception) -> Response:
        return error_response(404, str(error))

    @app.exception_handler(StoreError)
    def store(_: Request, error: Exception) -> Response:
        _log.warning("%s", error)
        return error_response(503, "the run store cannot be read now; see the dashboard's log.")

    @app.exception_handler(DataError)
    def incomparable(_: Request, error: Exception) -> Response:
        return error_response(422, "the database cannot compare one of the values, such as text with a NUL.")

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: Exception) -> Response:
        found = error.errors() if isinstance(error, RequestValidationError) else []
        fields = [
            FieldError(
                field=".".join(str(part) for part in each["loc"][1:])[:_MESSAGE_CHARACTERS],
                message=str(each["msg"])[:_MESSAGE_CHARACTERS],
            )
            for each in found[:_MOST_FIELDS]
        ]
        named = "; ".join(f"{each.field}: {each.message}" for each in fields)
        return error_response(422, named or "the request is not valid.", fields=fields)

    @app.exception_handler(HTTPException)
    def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers) if error.headers else None
        return error_response(error.status_code, str(error.detail), headers=headers)

    @app.exception_handler(Exception)
    def unexpected(_: Request, error: Exception) -> Response:
        _log.error("unexpected %s: %s", type(error).__name__, error, exc_info=error)
        return error_response(500, "this is a mistake of the dashboard's; see its log.")
