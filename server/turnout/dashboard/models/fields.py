"""Field types that every document shares."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Document(BaseModel):
    """A document of the API: unknown fields are a mistake of ours."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")


def finite_or_none(value: Any) -> Any:
    """Return None for NaN and infinity, which JSON cannot express."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


#: A number, or null where it is unknown or not finite.
Number: TypeAlias = Annotated[float | None, BeforeValidator(finite_or_none)]
#: A client's id as decimal digits: it may be up to 2^64 - 1, more than a JavaScript number holds.
ClientText: TypeAlias = Annotated[str, BeforeValidator(str), Field(pattern=r"^\d{1,20}$")]
MetricKind: TypeAlias = Literal["train", "evaluate", "diagnostics", "round"]
#: ``stale``: no commit for long; ``lost``: no process works on it any more although nothing ended it.
RunStatus: TypeAlias = Literal["running", "stale", "lost", "finished", "interrupted", "failed"]
Outcome: TypeAlias = Literal["absent", "ok", "failed", "rejected", "missing"]
