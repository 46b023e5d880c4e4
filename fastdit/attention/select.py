"""Selection maths that methods share: pooling over tiles, and which scores are kept. All of it in fp32."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tokens import VideoGrid


def pool_tiles(x: Tensor, grid: VideoGrid, tile: tuple[int, int, int]) -> Tensor:
    """Average tokens over tiles; a smaller tile at a far end is the mean of the tokens that it has.

    Args:
        x: ``(B, H, n, D)`` video tokens in raster order, any float dtype.
        grid: The video tokens.
        tile: ``(frames, height, width)`` of a tile, each at least 1.

    Returns:
        ``(B, H, M, D)`` fp32, tiles in raster order.
    """
    counts = [math.ceil(n / t) for n, t in zip(grid.shape, tile, strict=True)]
    x = x.unflatten(2, grid.shape)
    short = [c * t - n for c, t, n in zip(counts, tile, grid.shape, strict=True)]
    if any(short):
        x = F.pad(x, (0, 0, 0, short[2], 0, short[1], 0, short[0]))
    x = x.unflatten(4, (counts[2], tile[2])).unflatten(3, (counts[1], tile[1])).unflatten(2, (counts[0], tile[0]))
    sums = x.sum((3, 5, 7), dtype=torch.promote_types(x.dtype, torch.float32)).flatten(2, 4)
    return sums / tile_sizes(grid, tile).to(sums)[:, None]


def tile_sizes(grid: VideoGrid, tile: tuple[int, int, int]) -> Tensor:
    """Count the tokens of each tile: ``(M,)`` int64, tiles in raster order.

    Args:
        grid: The video tokens.
        tile: ``(frames, height, width)`` of a tile, each at least 1.
    """
    axes = []
    for n, t in zip(grid.shape, tile, strict=True):
        starts = torch.arange(0, n, t)
        axes.append((n - starts).clamp(max=t))
    return torch.einsum("f,h,w->fhw", *axes).flatten()


def keep_top_fraction(scores: Tensor, density: float) -> Tensor:
    """Keep the largest scores of each map as a whole, so that rows may keep different numbers.

    Scores equal to the smallest one kept are kept too.

    Args:
        scores: ``(..., Nq, Nk)``, any float dtype.
        density: Fraction of each ``Nq * Nk`` map to keep, in (0, 1].

    Returns:
        ``(..., Nq, Nk)`` bool.
    """
    flat = scores.flatten(-2)
    # the count dropped is rounded down, so at least one score is kept
    dropped = min(math.floor((1 - density) * flat.shape[-1] + 1e-6), flat.shape[-1] - 1)
    threshold = flat.kthvalue(dropped + 1, dim=-1).values
    return scores >= threshold[..., None, None]


def keep_text(video_blocks: Tensor, num_q: int, num_k: int) -> Tensor:
    """Extend a block map of the video by text blocks, which attend to all and are attended to by all.

    Args:
        video_blocks: ``(..., Mq, Mk)`` bool, the video part.
        num_q: Query blocks in all, at least ``Mq``.
        num_k: Key blocks in all, at least ``Mk``.

    Returns:
        ``(..., num_q, num_k)`` bool.
    """
    rows, columns = video_blocks.shape[-2:]
    return F.pad(video_blocks, (0, num_k - columns, 0, num_q - rows), value=True)
