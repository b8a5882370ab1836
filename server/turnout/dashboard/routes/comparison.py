"""Several runs, and the catalogue of methods."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from turnout.dashboard.errors import documented
from turnout.dashboard.models.comparison import Comparison, ConfigDiff, Method, MethodList
from turnout.dashboard.queries.comparison import Axis, comparison, config_diff
from turnout.dashboard.routes.parameters import Runs, SeriesName, series_key
from turnout.dashboard.services import Parts

router = APIRouter(tags=["comparison"])

_Side = Annotated[str, Query(min_length=1, max_length=64, pattern=r"^[\w.-]+$")]


@router.get("/compare", responses=documented(404))
def compare_runs(
    parts: Parts,
    run: Runs,
    metric: Annotated[
        SeriesName | None, Query(description="kind/name; left out: what the first run has.")
    ] = None,
    x: Axis = "round",
    points: Annotated[int, Query(ge=4, le=5_000)] = 500,
    target: Annotated[
        float | None, Query(allow_inf_nan=False, description="Also say which round first reached this.")
    ] = None,
) -> Comparison:
    """Show one metric of one to eight runs on a common axis, and a table of how they ended."""
    key = None if metric is None else series_key(metric)
    return comparison(parts.reader, run, metric=key, axis=x, points=points, target=target)


@router.get("/diff", responses=documented(404))
def diff_runs(parts: Parts, left: _Side, right: _Side) -> ConfigDiff:
    """Show what two runs were told differently."""
    return config_diff(parts.reader, left, right)


@router.get("/methods", responses=documented())
def list_methods(parts: Parts, kind: Annotated[str | None, Query(max_length=64)] = None) -> MethodList:
    """List what an experiment can name, with the papers. The first call takes some seconds."""
    entries = parts.catalogue()
    kinds = sorted({str(entry["kind"]) for entry in entries})
    return MethodList(
        items=[
            Method(
                slug=entry["slug"],
                kind=entry["kind"],
                paper=entry["paper"],
                url=f"https://arxiv.org/abs/{entry['paper']}" if entry["paper"] else None,
                class_path=entry["class"],
                summary=entry["summary"],
            )
            for entry in entries
            if kind is None or entry["kind"] == kind
        ],
        kinds=kinds,
    )
