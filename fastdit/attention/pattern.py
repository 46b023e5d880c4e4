"""Patterns: the order of the tokens and the blocks that are computed, and how patterns are made and merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layout import TokenLayout
from ..mask import BlockMask
from .kernels.device import has_triton
from .select import keep_text

Heads = tuple[int, ...]
Group = tuple[int, Heads]
"""The index of a method, and the heads that it computes, ascending."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """The decision of a method for one call: token order, and the blocks computed in that order.

    Args:
        layout: The order. Its block is a multiple of both block sizes of the mask.
        mask: The blocks, over the laid out sequence.
    """

    layout: TokenLayout
    mask: BlockMask

    @property
    def density(self) -> float:
        """Return the fraction of real (query, key) pairs that is computed, in [0, 1]."""
        return self.mask.density


def merge_heads(parts: Sequence[tuple[Heads, Pattern]]) -> Pattern:
    """Make one pattern of those of several groups of heads, which have one order and blocks of one size.

    Args:
        parts: The heads of each group, and their pattern.

    Returns:
        A pattern with lists for each head, the heads in ascending order.
    """
    masks = [pattern.mask for _, pattern in parts]
    batch, width = (max(mask.indices.shape[axis] for mask in masks) for axis in (0, 3))

    def join(name: str) -> Tensor:
        rows = {}
        for (heads, _), mask in zip(parts, masks, strict=True):
            lists = getattr(mask, name)
            if name == "indices":
                lists = torch.nn.functional.pad(lists, (0, width - lists.shape[3]))
            rows |= zip(heads, lists.expand(batch, len(heads), *lists.shape[2:]).unbind(1), strict=True)
        return torch.stack([rows[head] for head in sorted(rows)], 1)

    lists = {name: join(name) for name in ("indices", "counts", "full_counts")}
    return Pattern(parts[0][1].layout, replace(masks[0], **lists))


def pattern_of(layout: TokenLayout, video_blocks: Tensor, *, max_count: int | None = None) -> Pattern:
    """Make a pattern of the blocks that were chosen in the video; text attends to all and is attended to by all.

    Args:
        layout: The order, in blocks of the size of those chosen.
        video_blocks: ``(M, M)`` or ``(B or 1, H or 1, M, M)`` bool, M the blocks of the layout that hold video.
        max_count: An upper bound of the blocks in a row of ``video_blocks`` that does not keep all, where it is known;
            at least 1.
    """
    lengths = layout.block_lengths[None]
    text_blocks = layout.num_blocks - layout.video_blocks
    if max_count is not None and has_triton(video_blocks.device):
        from .kernels.triton.lists import triton_mask

        return Pattern(layout, triton_mask(video_blocks, layout.block, lengths, max_count=max_count + text_blocks))
    mask = BlockMask.from_dense(
        keep_text(video_blocks, layout.num_blocks, layout.num_blocks),
        block_q=layout.block,
        block_k=layout.block,
        lengths_q=lengths,
        lengths_k=lengths,
        max_count=None if max_count is None else max_count + text_blocks,
    )
    return Pattern(layout, mask)
