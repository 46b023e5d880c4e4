"""Mean keys and values of blocks; with compensation each skipped block counts as one mean key, weighted by its size.

Source: SVG-EAR (arXiv 2603.08982), section 4, where the blocks are clusters of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...mask import BlockMask
from .device import takes_triton


def block_means(x: Tensor, mask: BlockMask) -> Tensor:
    """Average keys or values over the real tokens of each key block.

    Args:
        x: ``(B, H, Sk, D)`` keys or values, any float dtype; padding may hold anything.
        mask: The blocks.

    Returns:
        ``(B, H, Nk, D)`` fp32, or fp64 for fp64; 0 for a block without real keys.
    """
    return means_of_blocks(x, mask.block_k, mask.lengths_k)


def means_of_blocks(x: Tensor, block: int, lengths: Tensor) -> Tensor:
    """Average tokens over the real ones of each block.

    Args:
        x: ``(B, H, S, D)``, any float dtype; the last block may be cut off, and padding may hold anything.
        block: Tokens per block, at least 1.
        lengths: ``(N,)``, ``(1 or H, N)`` or ``(B or 1, H or 1, N)`` real tokens of each block, the first ones in it.

    Returns:
        ``(B, H, N, D)`` fp32, or fp64 for fp64; 0 for a block without tokens.
    """
    if takes_triton(x):
        from .triton.means import triton_means_of_blocks

        return triton_means_of_blocks(x, block, lengths)
    x = pad(x, (0, 0, 0, lengths.shape[-1] * block - x.shape[2])).unflatten(2, (-1, block))
    padding = torch.arange(block, device=x.device) >= lengths[..., None]
    sums = torch.where(padding[..., None], 0, x).sum(3, dtype=torch.promote_types(x.dtype, torch.float32))
    return sums / lengths.clamp(min=1).to(sums)[..., None]
