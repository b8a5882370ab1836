"""The one shape of every error."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from turnout.dashboard.models.fields import Document

ErrorCode = Literal[
    "bad-request", "not-logged-in", "forbidden", "not-found", "method-not-allowed", "too-large", "invalid",
    "too-many", "internal", "store-gone",
]  # fmt: skip


class FieldError(Document):
    """What is wrong with one parameter."""

    field: str
    message: str


class ErrorDetail(Document):
    """What went wrong: a word for programs, a sentence for people."""

    code: ErrorCode
    message: str
    fields: list[FieldError] = Field(default_factory=list)


class ErrorBody(Document):
    """The body of every answer of 400 and above."""

    error: ErrorDetail
