"""Flower's privacy mods as links of an experiment: ``[link] name = "flwr:LocalDpMod"``.

They hold on every engine, and what they draw from NumPy's global generator comes from one seeded by (seed,
round, client): equal seeds give equal noise, so a seed that others know protects nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import mod as flower
from flwr.clientapp.typing import ClientAppCallable, Mod

from turnout.tasks.validation import check_count
from turnout.wire import keys
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register

_PURPOSE: Final = 3
_drawing = threading.Lock()


@register("flwr:LocalDpMod", "link", summary="Flower's local differential privacy on updates")
def local_dp(clipping_norm: float, sensitivity: float, epsilon: float, delta: float, seed: int = 0) -> Mod:
    """Return Flower's ``LocalDpMod``: updates are clipped, and Gaussian noise is added to the model sent.

    clipping_norm
        Largest Euclidean norm of an update.
    sensitivity
        Sensitivity of what is sent; ``clipping_norm`` bounds it.
    epsilon
        Privacy budget, above 0: smaller is more noise.
    delta
        Probability that the guarantee fails, in (0, 1).
    seed
        Seeds the noise; the run's seed unless it is given.
    """
    if epsilon <= 0 or not 0 < delta < 1:
        raise ConfigError(f"epsilon={epsilon!r}, delta={delta!r}: epsilon must be above 0, delta in (0, 1).")
    try:
        stock = flower.LocalDpMod(clipping_norm, sensitivity, epsilon, delta)
    except ValueError as error:
        raise ConfigError(f"clipping_norm={clipping_norm!r}, sensitivity={sensitivity!r}: {error}") from error
    return _seeded(stock, seed)


@register("flwr:fixedclipping_mod", "link", "1710.06963", summary="Flower's clipping of updates by clients")
def fixed_clipping(seed: int = 0) -> Mod:
    """Return Flower's ``fixedclipping_mod``, for ``flwr:DifferentialPrivacyClientSideFixedClipping``.

    seed
        Not used: nothing is drawn.
    """
    return _seeded(flower.fixedclipping_mod, seed)


@register("flwr:adaptiveclipping_mod", "link", "1905.03871", summary="Flower's adaptive clipping by clients")
def adaptive_clipping(seed: int = 0) -> Mod:
    """Return Flower's ``adaptiveclipping_mod``, for ``flwr:DifferentialPrivacyClientSideAdaptiveClipping``.

    seed
        Not used: nothing is drawn.
    """
    return _seeded(flower.adaptiveclipping_mod, seed)


def _seeded(stock: Mod, seed: int) -> Mod:
    check_count("seed", seed, low=0)

    def link(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if not message.metadata.message_type.startswith("train"):
            return call_next(message, context)
        # The client trains before the generator is touched: it may take long, and others train beside it.
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        client = int(context.node_config.get("partition-id", context.node_id))
        with _generator(seed, _round(message), client):
            return stock(message, context, _returning(reply))

    return link


def _returning(reply: Message) -> Callable[[Message, Context], Message]:
    return lambda message, context: reply


@contextmanager
def _generator(seed: int, server_round: int, client: int) -> Iterator[None]:
    """Seed NumPy's global generator, for one thread at a time, and put it back."""
    words = np.random.SeedSequence([seed, _PURPOSE, server_round, client]).generate_state(4)
    with _drawing:
        before = np.random.get_state()
        np.random.seed(words)
        try:
            yield
        finally:
            np.random.set_state(before)


def _round(message: Message) -> int:
    config = message.content.get(keys.CONFIG)
    value = config.get(keys.SERVER_ROUND) if isinstance(config, ConfigRecord) else None
    if not isinstance(value, int) or value < 0:
        raise ConfigError(
            f"{keys.SERVER_ROUND}={value!r} in the request's config; the noise is seeded by it, so the "
            "strategy must send the round."
        )
    return value
