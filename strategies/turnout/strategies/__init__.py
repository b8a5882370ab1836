"""Strategies for partial participation and noisy links; each is a ``flwr.serverapp.strategy.Strategy``."""

from __future__ import annotations

from turnout.strategies.average_all import AverageAll
from turnout.strategies.bo_rep import BORep
from turnout.strategies.bo_rep_local_upper import BORepLocalUpper
from turnout.strategies.dual_admm import DualADMM
from turnout.strategies.eco import ServerECO
from turnout.strategies.eggroll import EGGROLL
from turnout.strategies.fedamd import FedAMD, suggested_anchor_probability
from turnout.strategies.fedau import FedAU
from turnout.strategies.fedavg import FedAvg
from turnout.strategies.feddyn import FedDyn
from turnout.strategies.fedprox import FedProx
from turnout.strategies.fedstale import FedStale
from turnout.strategies.fedvarp import FedVARP
from turnout.strategies.field_space_continual import FieldSpaceContinual
from turnout.strategies.memory import ClientMemory, HalfMemory, MappedMemory, RamMemory, open_memory
from turnout.strategies.mifa import MIFA
from turnout.strategies.participation import ParticipationEstimator
from turnout.strategies.rerce_fed import RerceFed
from turnout.strategies.rounds import Callback, ClientReport, Instruction, Reply, RoundReport
from turnout.strategies.scaffold import Scaffold
from turnout.strategies.stock import StockStrategy
from turnout.strategies.streaming import StreamingStrategy
from turnout.strategies.unbiased_fedavg import UnbiasedFedAvg

__all__ = [
    "EGGROLL",
    "MIFA",
    "AverageAll",
    "BORep",
    "BORepLocalUpper",
    "Callback",
    "ClientMemory",
    "ClientReport",
    "DualADMM",
    "FedAMD",
    "FedAU",
    "FedAvg",
    "FedDyn",
    "FedProx",
    "FedStale",
    "FedVARP",
    "FieldSpaceContinual",
    "HalfMemory",
    "Instruction",
    "MappedMemory",
    "ParticipationEstimator",
    "RamMemory",
    "Reply",
    "RerceFed",
    "RoundReport",
    "Scaffold",
    "ServerECO",
    "StockStrategy",
    "StreamingStrategy",
    "UnbiasedFedAvg",
    "open_memory",
    "suggested_anchor_probability",
]
