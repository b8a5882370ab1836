"""TensorBoard event files, by the package ``tensorboard`` alone: neither PyTorch nor TensorFlow is loaded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from turnout.server.schema import RunRow
from turnout.server.trackers.tracker import Status, Tracker, flat

FOLDER: Final = "tensorboard"


class TensorBoardTracker(Tracker):
    """Writes to ``PLACE/<the run directory's name>``; by default to ``tensorboard`` in that directory.

    A resumed run gets a further file there. It begins by saying that the steps from its first round on
    are void, which TensorBoard and its readers heed.
    """

    def __init__(self, place: str | None) -> None:
        self._place = place

    def start(self, run: RunRow, directory: Path, *, first_round: int) -> None:
        """Open the next event file; a new run begins with its experiment, as text and as hyperparameters."""
        folder = directory / FOLDER if self._place is None else Path(self._place) / directory.name
        self._writer = EventFileWriter(str(folder), flush_secs=5)
        if first_round > 1 or any(folder.glob("events.*")):
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._event(step=first_round, session_log=log)
        if first_round == 1:
            values = {key: _plain(value) for key, value in flat(run.config).items()}
            self._event(step=0, summary=hparams_pb(values, trial_id=run.id))
            lines = "".join(f"| {key} | {value} |\n" for key, value in values.items())
            self._text("experiment", f"| key | value |\n| --- | --- |\n{lines}", step=0)
        self._last = first_round - 1
        self._writer.flush()

    def log(self, server_round: int, metrics: Mapping[str, float]) -> None:
        """Write one event with all of the round's scalars."""
        values = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        self._event(step=server_round, summary=summary_pb2.Summary(value=values))
        self._last = server_round
        self._writer.flush()

    def finish(self, status: Status, model_sha256: str | None) -> None:
        """Write the final model's hash, and close the file."""
        if model_sha256 is not None:
            self._text("model-sha256", model_sha256, step=self._last)
        self._writer.close()

    def _event(self, **fields: Any) -> None:
        self._writer.add_event(event_pb2.Event(wall_time=time.time(), **fields))

    def _text(self, tag: str, text: str, *, step: int) -> None:
        metadata = text_metadata.create_summary_metadata(display_name=tag, description="")
        tensor = make_tensor_proto([text.encode()])
        value = summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        self._event(step=step, summary=summary_pb2.Summary(value=[value]))


def _plain(value: Any) -> bool | float | str:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
