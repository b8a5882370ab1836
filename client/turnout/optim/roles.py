"""Which parameters of a module are matrices, vectors, embeddings, or the output layer's."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

Role = Literal["matrix", "vector", "embedding", "head"]


def parameter_roles(module: nn.Module) -> dict[Role, list[Tensor]]:
    """Return the trainable parameters of ``module`` by role, each once, in the module's order.

    A vector has fewer than two dimensions (biases, norms), whichever layer it is in. The head is the weight
    of the last linear layer, provided that other matrices remain.
    """
    embeddings = {
        id(layer.weight) for layer in module.modules() if isinstance(layer, (nn.Embedding, nn.EmbeddingBag))
    }
    roles: dict[Role, list[Tensor]] = {"matrix": [], "vector": [], "embedding": [], "head": []}
    for p in module.parameters():
        if p.requires_grad:
            role: Role = "embedding" if id(p) in embeddings else "matrix" if p.dim() >= 2 else "vector"
            roles[role].append(p)
    linear = [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]
    last = linear[-1] if linear else None
    rest = [p for p in roles["matrix"] if p is not last]
    if last is not None and rest and len(rest) < len(roles["matrix"]):
        roles["matrix"], roles["head"] = rest, [last]
    return roles
