"""``--log-to``: other people's trackers beside a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from turnout.cli.output import Output

if TYPE_CHECKING:
    from turnout.server.trackers import TrackingCallback

LogTo = Annotated[
    list[str] | None,
    typer.Option(
        "--log-to",
        metavar="TRACKER",
        help="Show the run elsewhere as well: tensorboard[:DIR] or mlflow[:URI]. Repeatable.",
    ),
]


def tracking(wanted: list[str] | None, output: Output) -> TrackingCallback:
    """Return the callback of the trackers in ``wanted``. Raises `ConfigError` for one that cannot be had."""
    from turnout.server.trackers import TrackerSpec, TrackingCallback

    return TrackingCallback([TrackerSpec.parse(text) for text in wanted or []], output.warn)
