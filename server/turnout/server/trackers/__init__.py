"""Other people's trackers beside the run store: TensorBoard and MLflow, both optional extras.

The store stays the truth: a tracker that fails never stops a run.
"""

from __future__ import annotations

from turnout.server.trackers.callback import TrackingCallback
from turnout.server.trackers.tracker import Tracker, TrackerSpec

__all__ = ["Tracker", "TrackerSpec", "TrackingCallback"]
