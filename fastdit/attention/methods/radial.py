"""Radial Attention: attention narrows with the distance between frames."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...tokens import AttentionCall, VideoGrid
from ..fields import Allowed, BlockSize, Count
from ..method import register
from ..ordered import OrderedMethod
from ..pattern import Pattern, pattern_of
from ..state import MethodState

COUNTS_AT_ONCE = 1 << 22


@register("radial")
@dataclass(frozen=True, kw_only=True)
class Radial(OrderedMethod):
    """Full attention to the same and neighbouring frames, and ever narrower bands to frames further away.

    Each doubling of the distance between two frames halves the band; where it would fall below ``min_band`` tokens,
    frame pairs are left out instead. The number of blocks grows as O(n log n) with the number of frames.

    On grids whose frames are a multiple of the block this is the mask of the released code, which differs from the
    paper's formula (bands are never narrower than a block, and ``decay`` does not thin frame pairs). On any other
    grid the same rule is applied to each part of a block that lies in one frame. In another order than raster, it is
    applied to the tokens of both blocks as a whole, so what it promises (neighbours, sink) holds for most pairs only.

    Args:
        decay: Factor on the band width of frames two or more apart, above 0. The released presets use 0.2 (Wan 2.1),
            0.8 (Wan 2.2) and 0.95 (HunyuanVideo).
        block_size: Tokens per block, a power of two in [16, 256].
        sink: Whether every query attends to the whole first frame (Wan: yes, HunyuanVideo: no).
        min_band: Band width before ``decay``, in tokens, below which frame pairs are thinned out, at least 1. It is
            128 in the released code, whatever the block size; 1 leaves no frame pair out.

    Source: Radial Attention (arXiv 2506.19852), section 4, and its released code.
    """

    static: ClassVar[bool] = True

    decay: Annotated[float, Allowed("a number above 0", lambda value: value > 0, "0.2 to 1 is usual")] = 0.2
    block_size: BlockSize = 128
    sink: bool = True
    min_band: Count = 128

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        grid, layout = call.tokens.grid, self.layout(call, q.device, state)
        in_raster = self.order in ("raster", "fhw")
        blocks = radial_blocks(
            grid,
            decay=self.decay,
            block_size=self.block_size,
            sink=self.sink,
            min_band=self.min_band,
            order=None if in_raster else self.video_order(call.tokens),
            device=q.device,
        )
        return pattern_of(layout, blocks)


def radial_blocks(
    grid: VideoGrid,
    *,
    decay: float,
    block_size: int,
    sink: bool,
    min_band: int = 128,
    order: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the block map of the video part: ``(N, N)`` bool.

    Args:
        grid: The video tokens.
        decay: Factor on the band width, above 0.
        block_size: Tokens per block, at least 1.
        sink: Whether the first frame's keys are always kept.
        min_band: Band width, in tokens, below which frame pairs are thinned out, at least 1.
        order: ``(n,)`` int64, the video tokens in the order that is cut into blocks; default: raster order.
        device: Where the map shall be.
    """
    frame = torch.arange(grid.frames, device=device)
    distance = (frame[:, None] - frame).abs()
    octave = (1 << grid.frame_tokens.bit_length()) / 2.0 ** torch.frexp(distance.double()).exponent.double()
    every = (min_band / octave).floor().clamp(min=1).long()
    widths = (octave * decay).clamp(block_size, grid.frame_tokens).floor().long()
    widths = widths.masked_fill(distance % every != 0, -1)
    widths = widths.masked_fill((distance <= 1) | (sink & (frame == 0)), grid.frame_tokens)
    if order is None:
        return _raster_blocks(grid, widths, block_size)
    return _ordered_blocks(grid, widths, block_size, order.to(device))


def _raster_blocks(grid: VideoGrid, widths: Tensor, block_size: int) -> Tensor:
    """Apply the rule to each part of a block that lies in one frame: ``(N, N)`` bool.

    ``widths``, ``(frames, frames)`` int64, is how far the band of two frames reaches to either side, -1 for no band.
    """
    num_blocks = math.ceil(grid.num_tokens / block_size)
    block, frame, first, last = _segments(grid, block_size, widths.device)
    kept = torch.zeros(num_blocks, num_blocks, dtype=torch.bool, device=widths.device)
    columns = block.expand(len(block), -1)
    for row in range(0, len(block), 512):  # bounds the (rows x segments) integer maps
        rows = slice(row, row + 512)
        width = widths[frame[rows, None], frame]
        # A column's share of the band is a trapezoid over the columns, so both column sets are intervals.
        some = _overlap(first, last, first[rows, None] - width, last[rows, None] + width)
        third = (last - first + 1)[rows, None] // 3
        most = _overlap(first, last, first[rows, None] + third - width, last[rows, None] - third + width)
        dense_enough = (width >= 0) & (5 * most > 3 * some)
        kept.view(-1).index_put_(
            ((block[rows, None] * num_blocks + columns[rows]).flatten(),), dense_enough.flatten(), accumulate=True
        )
    return kept


def _ordered_blocks(grid: VideoGrid, widths: Tensor, block_size: int, order: Tensor) -> Tensor:
    """Apply the rule to whole blocks, counting the queries whose band holds each key: ``(N, N)`` bool."""
    size, missing = grid.frame_tokens, -grid.num_tokens % block_size
    place = torch.arange(size, device=order.device)
    kept = []
    for tokens in order.split(max(1, COUNTS_AT_ONCE // grid.num_tokens) * block_size):
        row = torch.arange(len(tokens), device=order.device) // block_size
        shape = math.ceil(len(tokens) / block_size), grid.num_tokens
        held = torch.zeros(shape, dtype=torch.float32, device=order.device)
        held[row, tokens] = 1
        total = held.sum(1, keepdim=True)
        held = held.unflatten(1, (grid.frames, size))
        frames = held.amax((0, 2)).nonzero().flatten()  # few of them in tile order
        before = F.pad(held[:, frames].cumsum(-1), (1, 0))
        queries = torch.zeros_like(held)
        for width in widths[widths >= 0].unique().tolist():
            near = before[..., (place + width + 1).clamp(max=size)] - before[..., (place - width).clamp(min=0)]
            queries += (widths[frames] == width).to(near).mT @ near
        queries = F.pad(queries.flatten(1)[:, order], (0, missing)).unflatten(1, (-1, block_size))
        most, some = (3 * queries > total[..., None]).sum(-1), (queries > 0).sum(-1)
        kept.append(5 * most > 3 * some)
    return torch.cat(kept)


def _segments(grid: VideoGrid, block_size: int, device: torch.device | str) -> tuple[Tensor, ...]:
    """Cut blocks at frame borders: block, frame, first and last position in the frame of each piece, ``(M,)`` each."""
    borders = [torch.arange(0, grid.num_tokens, size, device="cpu") for size in (block_size, grid.frame_tokens)]
    starts = torch.cat(borders).unique()
    ends = torch.cat([starts[1:], starts.new_tensor([grid.num_tokens])]) - 1
    frame = starts // grid.frame_tokens
    pieces = (starts // block_size, frame, starts - frame * grid.frame_tokens, ends - frame * grid.frame_tokens)
    return tuple(piece.to(device) for piece in pieces)


def _overlap(first: Tensor, last: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (torch.minimum(last, high) - torch.maximum(first, low) + 1).clamp(min=0)
