"""How clients train: the settings of `client_app`, checked when the app is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from turnout.client.optimizer_choice import check_choice, state_warning
from turnout.optim import StatePolicy
from turnout.tasks.validation import check_count, check_number
from turnout.wire.errors import ConfigError, unknown_name

Reference = Literal["telescoped", "fresh"]
Precision = Literal["float32", "bf16-mixed"]
ReplyForm = Literal["dense", "coded"]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Settings of local training; bad ones raise `ConfigError` naming field, value and fix.

    Attributes
    ----------
    optimizer
        "sgd" (a tight path of our own), a method of the optimizer library ("frugal"), or any other
        ``torch.optim`` class by name.
    optimizer_options
        Table of further settings of the optimizer, as its class takes them.
    optimizer_state
        What becomes of the optimizer's state between rounds: "reset" (anew each round), "keep" (stays with
        the client) or "send" (travels with the reply; the server averages it over the participants and
        sends it with the next model). Choices that break a method are refused.
    reply
        "dense", or "coded": what the optimizer moved by whole steps (FRUGAL), or holds on a grid (ECO),
        travels as small whole numbers. Strategies see the same numbers, to the bit. Refused where the
        optimizer, the strategy or a link needs something else.
    lr
        Learning rate of the local steps.
    momentum
        As in ``torch.optim``.
    weight_decay
        As in ``torch.optim``. For "sgd" it is part of every gradient, anchors' included.
    batch_size
        Examples per step, at most; the last batch of an epoch may be smaller.
    local_steps, local_epochs
        Length of local training: give one of the two (one epoch when neither is given).
    anchor_batch_size
        Examples of an anchor's gradient (FedAMD); None is the whole local set.
    reference
        How gradient-form ADMM keeps its reference gradient: "telescoped" has the
        right fixed point with loose local solves; "fresh" recomputes it from the whole local set.
    closed_form
        Use the task's exact ADMM steps where it has them; False forces the gradient form.
    precision
        "float32", or "bf16-mixed": the model's products of local training are in bfloat16
        (``torch.autocast``); parameters, gradients, loss and optimizer stay as they are. Evaluation is not
        affected.
    seed
        Seed of minibatch order, together with client and round.
    device
        "auto" (CUDA when present), "cpu", "cuda", "cuda:1", ...
    """

    optimizer: str = "sgd"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    optimizer_state: StatePolicy = "reset"
    reply: ReplyForm = "dense"
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 32
    local_steps: int | None = None
    local_epochs: int | None = None
    anchor_batch_size: int | None = None
    reference: Reference = "telescoped"
    closed_form: bool = True
    precision: Precision = "float32"
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_number("lr", self.lr, low=0, open_low=True)
        check_number("momentum", self.momentum, low=0, high=1, open_high=True)
        check_number("weight_decay", self.weight_decay, low=0)
        check_count("batch_size", self.batch_size, low=1)
        check_count("seed", self.seed, low=0)
        for name in ("local_steps", "local_epochs", "anchor_batch_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), low=1)
        if self.local_steps is not None and self.local_epochs is not None:
            raise ConfigError(
                f"local_steps={self.local_steps} and local_epochs={self.local_epochs} both set the length of "
                "local training; give one of them."
            )
        if self.reference not in ("telescoped", "fresh"):
            raise unknown_name("reference", str(self.reference), ("telescoped", "fresh"))
        if self.precision not in get_args(Precision):
            raise unknown_name("precision", str(self.precision), get_args(Precision))
        if self.reply not in get_args(ReplyForm):
            raise unknown_name("reply", str(self.reply), get_args(ReplyForm))
        check_choice(self)
        self._check_device()

    def _check_device(self) -> None:
        try:
            device = torch.device(self.resolved_device)
        except RuntimeError as error:
            raise ConfigError(f"device={self.device!r} is not known; use 'auto', 'cpu' or 'cuda'.") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device={self.device!r} but no CUDA device is present; use 'auto' or 'cpu'.")

    @property
    def resolved_device(self) -> str:
        """The device to train on, with "auto" decided."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def own_sgd(self) -> bool:
        """Whether steps are taken by our own SGD rather than an optimizer class."""
        return self.optimizer.lower() == "sgd" and self.optimizer_state == "reset"

    @property
    def plain_sgd(self) -> bool:
        """Whether a step is exactly ``y <- y - lr * gradient``."""
        return self.own_sgd and self.momentum == 0.0

    @property
    def warning(self) -> str | None:
        """What the chosen optimizer's paper warns of with ``optimizer_state``, or None."""
        return state_warning(self)
