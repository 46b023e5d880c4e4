"""Skipped blocks whose means join the softmax, and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ...mask import BlockMask


def dropped_blocks(mask: BlockMask) -> Tensor:
    """Mark the skipped key blocks, computed once per mask: ``(B or 1, H or 1, Nq, Nk)`` bool.

    True where a query block does not list a key block that holds real keys.

    Args:
        mask: The blocks.
    """
    if "dropped" not in mask.derived:
        mask.derived["dropped"] = ~mask.to_dense() & (mask.lengths_k > 0)[:, :, None]
    return mask.derived["dropped"]


def log_sizes(mask: BlockMask, dtype: torch.dtype) -> Tensor:
    """Return the bias on the logits of mean keys: ``(B or 1, H or 1, Nk)``, the natural log of their real keys.

    Args:
        mask: The blocks.
        dtype: fp32 or fp64.
    """
    return mask.lengths_k.clamp(min=1).to(dtype).log()
