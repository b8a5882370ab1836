"""Clients: the ClientApp builder, local updates, the link between server and client."""

from __future__ import annotations

from turnout.client.app import client_app
from turnout.client.flat_model import FlatModel
from turnout.client.local_round import LocalRound, Outcome
from turnout.client.local_updates import LocalUpdate
from turnout.client.mods import noisy_link
from turnout.client.options import TrainOptions
from turnout.client.state import ClientState

__all__ = [
    "ClientState",
    "FlatModel",
    "LocalRound",
    "LocalUpdate",
    "Outcome",
    "TrainOptions",
    "client_app",
    "noisy_link",
]
