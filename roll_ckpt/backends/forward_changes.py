"""Models whose forward pass changes parameters, so that a save cannot copy them under training."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def changes_in_forward(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether any of `modules` or their parts changes its parameters in its forward pass, as far as torch's own do.

    Embeddings with a `max_norm` scale their rows down there (torch/nn/functional.py, `embedding`).
    """
    kinds = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    return any(isinstance(part, kinds) and part.max_norm is not None for module in modules for part in module.modules())
