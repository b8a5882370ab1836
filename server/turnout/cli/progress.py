"""Live progress of runs: one line per run that moves on a terminal, plain lines elsewhere.

Elsewhere rounds get a line each, unless they are shorter than half a second: then two a second at most.
Ctrl-C ends the run when the round in progress is committed; pressed again, it ends it at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from turnout.cli.output import Output
from turnout.cli.stopping import StopSignals
from turnout.cli.wording import metric_text
from turnout.strategies import Callback, RoundReport, StreamingStrategy

if TYPE_CHECKING:
    from rich.progress import TaskID

_SPARKS: Final = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH: Final = 24
_SHOWN_FAILURES: Final = 3
_LINE_SECONDS: Final = 0.5


class RunProgress(Callback):
    """Shows round, loss, accuracy and how many clients took part, and the first failures with traceback."""

    def __init__(self, output: Output, labels: Sequence[str], *, stop: StopSignals | None = None) -> None:
        self._output = output
        self._width = max((len(label) for label in labels), default=0)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("[cyan]{task.fields[curve]}"),
            TimeRemainingColumn(compact=True),
            console=output.err,
            disable=not output.live,
        )
        self._label = ""
        self._task: TaskID | None = None
        self._curve: list[float] = []
        self._metrics: dict[str, float] = {}
        self._failures = 0
        self._clients: int | None = None
        self._last = 0
        self._said = -math.inf
        self._own_stop = stop is None
        self._stop = StopSignals() if stop is None else stop

    def __enter__(self) -> RunProgress:
        if self._own_stop:
            self._stop.__enter__()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._own_stop:
            self._stop.__exit__()

    def begin(self, label: str, *, num_clients: int) -> None:
        """Start the line of the next run."""
        self._label, self._clients = label, num_clients
        self._task, self._curve, self._metrics, self._failures = None, [], {}, 0

    def on_start(self, strategy: StreamingStrategy, *, num_rounds: int, first_round: int) -> None:
        """Show the run."""
        self._last = num_rounds
        self._task = self._progress.add_task(
            self._label.ljust(self._width), total=num_rounds, completed=first_round - 1, numbers="", curve=""
        )

    def on_round_end(self, report: RoundReport) -> None:
        """Show a round."""
        self._metrics.update(report.evaluate_metrics)
        name = "accuracy" if "accuracy" in self._metrics else "loss"
        if name in report.evaluate_metrics:
            self._curve.append(report.evaluate_metrics[name])
        outcomes = [client.outcome for client in report.clients]
        present = outcomes.count("ok")
        troubled = len(outcomes) - present
        numbers = "  ".join(_numbers(self._metrics))
        people = f"{present} of {self._clients} clients"
        people += f", {troubled} failed" if troubled else ""
        self._output.about["round"] = report.server_round
        self._tell_failures(report)
        if self._output.live and self._task is not None:
            self._progress.update(
                self._task,
                completed=report.server_round,
                numbers=f"{numbers}  [dim]{people}[/]",
                curve=sparkline(self._curve),
            )
        elif self._due(report.server_round):
            self._said = time.monotonic()
            seconds = sum(
                report.seconds.get(phase, 0.0) for phase in ("select", "train", "finish", "evaluate")
            )
            self._output.say(
                f"{self._label.ljust(self._width)}  round {report.server_round}/{self._last}  {numbers}  "
                f"{people}  {seconds:.2f} s",
                markup=False,
            )
        self._stop.check()

    def _due(self, server_round: int) -> bool:
        """Whether the round gets a line: a log gets all of them, people two a second."""
        pause = time.monotonic() - self._said
        return self._output.as_log or pause >= _LINE_SECONDS or server_round == self._last

    def _tell_failures(self, report: RoundReport) -> None:
        for client in report.clients:
            if client.outcome not in ("failed", "rejected"):
                continue
            self._failures += 1
            if self._failures <= _SHOWN_FAILURES or self._output.as_log:
                self._output.warn(
                    f"client {client.client} {client.outcome} in round {report.server_round}: "
                    f"{client.reason.strip()}",
                    client=client.client,
                )
            if self._failures == _SHOWN_FAILURES and not self._output.as_log:
                self._output.warn("further failures are counted, and kept in the run store")


def sparkline(values: Sequence[float]) -> str:
    """Return the latest ``values`` as a row of little bars; a gap where a value is not finite."""
    values = values[-_SPARK_WIDTH:]
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    top = len(_SPARKS) - 1
    return "".join(
        _SPARKS[round((value - low) / span * top)] if math.isfinite(value) else " " for value in values
    )


def _numbers(metrics: Mapping[str, float]) -> list[str]:
    shown = [name for name in ("loss", "accuracy") if name in metrics]
    if "accuracy" not in metrics:
        shown += [name for name in metrics if name not in shown][:1]
    return [escape(f"{name} {metric_text(name, metrics[name])}") for name in shown]
