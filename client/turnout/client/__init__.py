"""Clients: the ClientApp builder, local updates, the link between server and client.

Names load when they are first asked for: a node process with an app of its own needs no PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import turnout.wire.lazy

if TYPE_CHECKING:
    from turnout.client.app import client_app
    from turnout.client.flat_model import FlatModel
    from turnout.client.home_app import at_home
    from turnout.client.local_round import LocalRound
    from turnout.client.local_updates import LocalUpdate
    from turnout.client.mods import noisy_link
    from turnout.client.options import TrainOptions
    from turnout.client.state import ClientState
    from turnout.client.work import Outcome, Work

__all__ = [
    "ClientState",
    "FlatModel",
    "LocalRound",
    "LocalUpdate",
    "Outcome",
    "TrainOptions",
    "Work",
    "at_home",
    "client_app",
    "noisy_link",
]

_HOMES: Final = {
    "ClientState": "state",
    "FlatModel": "flat_model",
    "LocalRound": "local_round",
    "LocalUpdate": "local_updates",
    "Outcome": "work",
    "TrainOptions": "options",
    "Work": "work",
    "at_home": "home_app",
    "client_app": "app",
    "noisy_link": "mods",
}
__getattr__ = turnout.wire.lazy.loader(__name__, _HOMES)
