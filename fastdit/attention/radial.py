"""Radial Attention: attention narrows with the distance between frames."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..layout import TokenLayout
from ..mask import BlockMask
from ..tokens import AttentionCall, VideoGrid
from .base import BlockMethod, Pattern, check_block_size, register
from .select import keep_text
from .state import MethodState


@register("radial")
@dataclass(frozen=True, kw_only=True)
class Radial(BlockMethod):
    """Attend fully to the same and the neighbouring frames, and in ever narrower bands to frames further away.

    Each doubling of the distance between two frames halves the band; where it would fall below ``min_band`` tokens,
    frame pairs are left out instead. The number of blocks grows as O(n log n) with the number of frames.

    On grids whose frames are a multiple of the block this is the mask of the released code, which differs from the
    paper's formula (bands are never narrower than a block, and ``decay`` does not thin frame pairs). On any other
    grid the same rule is applied to each part of a block that lies in one frame.

    Args:
        decay: Factor on the band width of frames two or more apart, above 0. The released presets use 0.2 (Wan 2.1),
            0.8 (Wan 2.2) and 0.95 (HunyuanVideo).
        block_size: Tokens per block, a power of two in [16, 256].
        sink: Whether every query attends to the whole first frame (Wan: yes, HunyuanVideo: no).
        min_band: Band width before ``decay``, in tokens, below which frame pairs are thinned out, at least 1. It is
            128 in the released code, whatever the block size; 1 leaves no frame pair out.

    Raises:
        ValueError: ``decay`` is not above 0, ``block_size`` is none of those, or ``min_band`` is below 1.

    Source: Radial Attention (arXiv 2506.19852), section 4, and its released code.
    """

    static: ClassVar[bool] = True

    decay: float = 0.2
    block_size: int = 128
    sink: bool = True
    min_band: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.decay, (int, float)) and 0 < self.decay < math.inf):
            raise ValueError(f"decay must be a number above 0, got {self.decay!r}; 0.2 to 1 is usual")
        check_block_size("block_size", self.block_size)
        if isinstance(self.min_band, bool) or not isinstance(self.min_band, int) or self.min_band < 1:
            raise ValueError(f"min_band must be a number of tokens of at least 1, got {self.min_band!r}")

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        """Build the bands for a grid.

        Args:
            q: ``(B, H, S, D)`` queries; only their device matters.
            k: ``(B, H, S, D)`` keys; not used.
            call: The call.
            state: Not used.
        """
        layout = TokenLayout.build(call.tokens, block=self.block_size, device=q.device)
        blocks = radial_blocks(
            call.tokens.grid,
            decay=self.decay,
            block_size=self.block_size,
            sink=self.sink,
            min_band=self.min_band,
            device=q.device,
        )
        lengths = layout.lengths()[None]
        mask = BlockMask.from_dense(
            keep_text(blocks, layout.num_blocks, layout.num_blocks),
            block_q=self.block_size,
            block_k=self.block_size,
            lengths_q=lengths,
            lengths_k=lengths,
        )
        return Pattern(layout, mask)


def radial_blocks(
    grid: VideoGrid,
    *,
    decay: float,
    block_size: int,
    sink: bool,
    min_band: int = 128,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the block map of the video part: ``(N, N)`` bool.

    Args:
        grid: The video tokens, in raster order.
        decay: Factor on the band width, above 0.
        block_size: Tokens per block, at least 1.
        sink: Whether the first frame's keys are always kept.
        min_band: Band width, in tokens, below which frame pairs are thinned out, at least 1.
        device: Where the map shall be.
    """
    num_blocks = math.ceil(grid.num_tokens / block_size)
    block, frame, first, last = _segments(grid, block_size, device)
    power = 1 << grid.frame_tokens.bit_length()
    kept = torch.zeros(num_blocks, num_blocks, dtype=torch.bool, device=device)
    columns = block.expand(len(block), -1)
    for row in range(0, len(block), 512):  # bounds the (rows x segments) integer maps
        rows = slice(row, row + 512)
        distance = (frame[rows, None] - frame).abs()
        octave = power / 2.0 ** _bit_length(distance)
        full = distance <= 1
        if sink:
            full = full | (frame == 0)
        every = (min_band / octave).floor().clamp(min=1).long()
        near = full | (distance % every == 0)
        width = (octave * decay).clamp(min=block_size).floor().long()
        width = torch.where(full, grid.frame_tokens, width)
        # A column's share of the band is a trapezoid over the columns, so both column sets are intervals.
        some = _overlap(first, last, first[rows, None] - width, last[rows, None] + width)
        third = (last - first + 1)[rows, None] // 3
        most = _overlap(first, last, first[rows, None] + third - width, last[rows, None] - third + width)
        dense_enough = near & (5 * most > 3 * some)
        kept.view(-1).index_put_(
            ((block[rows, None] * num_blocks + columns[rows]).flatten(),), dense_enough.flatten(), accumulate=True
        )
    return kept


def _segments(grid: VideoGrid, block_size: int, device: torch.device | str) -> tuple[Tensor, ...]:
    """Cut blocks at frame borders: block, frame, first and last position in the frame of each piece, ``(M,)`` each."""
    starts = torch.cat(
        [torch.arange(0, grid.num_tokens, block_size), torch.arange(0, grid.num_tokens, grid.frame_tokens)]
    ).unique()
    ends = torch.cat([starts[1:], torch.tensor([grid.num_tokens])]) - 1
    frame = starts // grid.frame_tokens
    pieces = (starts // block_size, frame, starts - frame * grid.frame_tokens, ends - frame * grid.frame_tokens)
    return tuple(piece.to(device) for piece in pieces)


def _bit_length(x: Tensor) -> Tensor:
    return torch.frexp(x.double()).exponent


def _overlap(first: Tensor, last: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (torch.minimum(last, high) - torch.maximum(first, low) + 1).clamp(min=0)
