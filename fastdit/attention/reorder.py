"""Reordering of tokens by a layout, and means over its blocks or parts of blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..layout import TokenLayout
from .kernels.device import takes_triton
from .select import mass_of_points, pool_blocks


def lay_out(layout: TokenLayout, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Put tokens into the order of a layout; padding becomes 0. On a GPU all of them in one launch.

    Args:
        layout: The order.
        *tensors: One to three of ``(B, H, S, D)``, of one shape and dtype.

    Returns:
        As many of ``(B, H, S_padded, D)``; the tensors themselves if nothing changes.
    """
    if layout.identity or not takes_triton(*tensors):
        return tuple(layout.apply(x) for x in tensors)
    from .kernels.triton.layout import triton_lay_out

    return triton_lay_out(layout.index, *tensors)


def put_back(layout: TokenLayout, x: Tensor) -> Tensor:
    """Put tokens back into the model's own order and drop the padding.

    Args:
        layout: The order.
        x: ``(B, H, S_padded, D)``.

    Returns:
        ``(B, H, S, D)``; ``x`` itself if nothing changes.
    """
    if layout.identity or not takes_triton(x):
        return layout.undo(x)
    from .kernels.triton.layout import triton_lay_out

    return triton_lay_out(layout.inverse, x)[0]


def pool_laid_out(layout: TokenLayout, x: Tensor, *, parts: int = 1) -> Tensor:
    """Average tokens over the blocks of a layout, or over parts of them. On a GPU they are read once, where they are.

    Args:
        layout: The order.
        x: ``(B, H, S, D)`` tokens in the model's own order, any float dtype.
        parts: Runs of equal length that a block is cut into, a divisor of its length.

    Returns:
        ``(B, H, N * parts, D)`` fp32, video blocks first; 0 for a part without tokens.
    """
    block = layout.block // parts
    lengths = layout.block_lengths if parts == 1 else layout.lengths(block)
    if takes_triton(x):
        from .kernels.triton.means import triton_means_of_blocks

        means = triton_means_of_blocks(x, block, lengths, index=layout.index)
    else:
        means = pool_blocks(layout.apply(x), block, lengths)
    return F.pad(means, (0, 0, 0, layout.num_blocks * parts - means.shape[2]))


def part_scores(q: Tensor, k: Tensor, layout: TokenLayout, *, parts: int, scale: float) -> Tensor:
    """Estimate how much attention each video block pays to each, from the means of parts of blocks.

    Between the mean of a block, which hides what its tokens do not share, and a few tokens drawn, which miss what they
    do: of the mass that the best choice holds, parts of a few neighbours find most.

    Args:
        q: ``(B, H, S, D)`` queries in the model's own order, any float dtype.
        k: ``(B, H, S, D)`` keys, likewise.
        layout: The order.
        parts: Parts of a block, a divisor of its length; more of them are better and cost their square.
        scale: Softmax scale.

    Returns:
        ``(B, H, M, M)`` fp32 in [0, 1], every row adds up to 1, over the M video blocks.
    """
    video = layout.video_blocks * parts
    sizes = layout.lengths(layout.block // parts)[None, :, :video]
    sizes = F.pad(sizes, (0, video - sizes.shape[-1])).unflatten(-1, (-1, parts))
    means_q, means_k = (pool_laid_out(layout, x, parts=parts)[:, :, :video] for x in (q, k))
    return mass_of_points(means_q, means_k, sizes, scale=scale)
