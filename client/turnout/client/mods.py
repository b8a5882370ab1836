"""Flower client mods that model the link between server and client."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod

from turnout.tasks.validation import check_count, check_number
from turnout.wire import keys
from turnout.wire.errors import ConfigError
from turnout.wire.layout import ParameterLayout
from turnout.wire.registry import register

_DOWN: Final = 0
_UP: Final = 1
# w_0 is agreed before the run (both sides can draw it from a seed), so it does not cross the noisy link; what
# adapters share is indices, and is checked by a digest.
_NOISE_FREE: Final = frozenset({keys.INITIAL, keys.SHARED})


@register(
    "noisy", kind="link", paper="2409.13451", summary="Additive Gaussian noise on what is received and sent"
)
def noisy_link(
    sigma_up: float = 0.0, sigma_down: float = 0.0, seed: int = 0, *, relative: bool = False
) -> Mod:
    """Return a client mod that adds i.i.d. N(0, sigma^2) to each vector received and sent while training.

    Every record of float arrays is one vector and gets exactly one draw, seeded by (seed, direction, round,
    client, record name); integer and batch-norm buffers and the record "initial" are left alone. Raises
    `ConfigError` for a negative or non-finite sigma.

    sigma_up
        Standard deviation of the noise on what clients send; 0 leaves it untouched.
    sigma_down
        Standard deviation of the noise on what clients receive; 0 leaves it untouched.
    seed
        Seeds the noise; the run's seed unless it is given.
    relative
        The sigmas are in units of each tensor's root mean square.
    """
    check_number("sigma_up", sigma_up, low=0)
    check_number("sigma_down", sigma_down, low=0)
    check_count("seed", seed, low=0)

    def link(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if not message.metadata.message_type.startswith("train"):
            return call_next(message, context)
        client = context.node_config.get("partition-id", context.node_id)
        server_round = _server_round(message)

        def noisy(content: RecordDict, direction: int, sigma: float) -> RecordDict:
            def draw(key: str) -> np.random.Generator:
                return np.random.default_rng(
                    [seed, direction, server_round, int(client), zlib.crc32(key.encode())]
                )

            return _noisy_content(content, sigma, relative, draw)

        original = message.content
        if sigma_down > 0:
            message.content = noisy(original, _DOWN, sigma_down)
        try:
            reply = call_next(message, context)
        finally:
            message.content = original
        if sigma_up > 0 and reply.has_content():
            reply.content = noisy(reply.content, _UP, sigma_up)
        return reply

    return link


def _noisy_content(
    content: RecordDict, sigma: float, relative: bool, draw: Callable[[str], np.random.Generator]
) -> RecordDict:
    """Return ``content`` with noise on its array records; the given ones are shared and stay as they are."""
    noisy = RecordDict()
    for key, record in content.items():
        if not isinstance(record, ArrayRecord) or key in _NOISE_FREE:
            noisy[key] = record
            continue
        layout = ParameterLayout.from_arrays(record)
        vector = layout.flatten(record)
        noise = draw(key).standard_normal(layout.size).astype(layout.dtype, copy=False)
        noise *= sigma
        if relative:
            for tensor in layout.tensors:
                piece = slice(tensor.offset, tensor.offset + tensor.size)
                noise[piece] *= np.sqrt(np.mean(np.square(vector[piece])))
        noise += vector
        noisy[key] = layout.record(noise, layout.buffers_of(record))
    return noisy


def _server_round(message: Message) -> int:
    config = message.content.get(keys.CONFIG)
    value = config.get(keys.SERVER_ROUND) if isinstance(config, ConfigRecord) else None
    if not isinstance(value, int) or value < 0:
        raise ConfigError(
            f"noisy_link seeds its noise by {keys.SERVER_ROUND!r} in the request's config, got {value!r}; "
            "the strategy must send the round."
        )
    return value
