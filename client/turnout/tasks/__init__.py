"""Learning problems: data sets, models, and how examples are spread over clients.

Names load when they are first asked for: a server whose clients bring an app of their own needs `External`
alone, and no PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import turnout.wire.lazy
from turnout.tasks.external import External
from turnout.tasks.task import AdmmSolver, ClientData, Task

if TYPE_CHECKING:
    from turnout.tasks.bilevel import BilevelTask
    from turnout.tasks.classification import ClassificationTask, Examples, ImageTask
    from turnout.tasks.digits import Digits
    from turnout.tasks.fashion_mnist import FashionMnist, load_fashion_mnist
    from turnout.tasks.gaussian_mixture import GaussianMixture
    from turnout.tasks.grunfeld import Grunfeld
    from turnout.tasks.hyper_cleaning import HyperCleaning
    from turnout.tasks.hyper_representation import HyperRepresentation
    from turnout.tasks.least_squares import LeastSquaresTask
    from turnout.tasks.losses import known_loss
    from turnout.tasks.mnist5k import Mnist5k
    from turnout.tasks.partition import (
        Dirichlet,
        Iid,
        LabelMix,
        LabelSwap,
        Natural,
        Partition,
        Partitioner,
        Shards,
        make_partitioner,
    )
    from turnout.tasks.permuted import Permuted
    from turnout.tasks.planted_labels import PlantedLabels
    from turnout.tasks.shakespeare_lm import ShakespeareLm
    from turnout.tasks.vader_sentiment import VaderSentiment
    from turnout.tasks.vision_transfer import VisionTransfer
    from turnout.tasks.wls import Wls

__all__ = [
    "AdmmSolver",
    "BilevelTask",
    "ClassificationTask",
    "ClientData",
    "Digits",
    "Dirichlet",
    "Examples",
    "External",
    "FashionMnist",
    "GaussianMixture",
    "Grunfeld",
    "HyperCleaning",
    "HyperRepresentation",
    "Iid",
    "ImageTask",
    "LabelMix",
    "LabelSwap",
    "LeastSquaresTask",
    "Mnist5k",
    "Natural",
    "Partition",
    "Partitioner",
    "Permuted",
    "PlantedLabels",
    "ShakespeareLm",
    "Shards",
    "Task",
    "VaderSentiment",
    "VisionTransfer",
    "Wls",
    "known_loss",
    "load_fashion_mnist",
    "make_partitioner",
]

_HOMES: Final = {
    "BilevelTask": "bilevel",
    "ClassificationTask": "classification",
    "Digits": "digits",
    "Dirichlet": "partition",
    "Examples": "classification",
    "FashionMnist": "fashion_mnist",
    "GaussianMixture": "gaussian_mixture",
    "Grunfeld": "grunfeld",
    "HyperCleaning": "hyper_cleaning",
    "HyperRepresentation": "hyper_representation",
    "Iid": "partition",
    "ImageTask": "classification",
    "LabelMix": "partition",
    "LabelSwap": "partition",
    "LeastSquaresTask": "least_squares",
    "Mnist5k": "mnist5k",
    "Natural": "partition",
    "Partition": "partition",
    "Partitioner": "partition",
    "Permuted": "permuted",
    "PlantedLabels": "planted_labels",
    "ShakespeareLm": "shakespeare_lm",
    "Shards": "partition",
    "VaderSentiment": "vader_sentiment",
    "VisionTransfer": "vision_transfer",
    "Wls": "wls",
    "known_loss": "losses",
    "load_fashion_mnist": "fashion_mnist",
    "make_partitioner": "partition",
}
__getattr__ = turnout.wire.lazy.loader(__name__, _HOMES)
