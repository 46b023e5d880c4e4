"""Methods that cut the video into blocks along an order of the user's choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ..layout import ORDERS, TokenLayout, order_without_gaps, token_order
from ..mask import BlockMask
from ..tokens import AttentionCall, TokenSpec
from .base import BlockMethod, Pattern
from .fields import Allowed, BlockSize, Tile
from .kernels.device import has_triton
from .select import keep_text
from .state import MethodState

Order = Annotated[str, Allowed(f"one of {', '.join(ORDERS)}", ORDERS.__contains__)]


@dataclass(frozen=True, kw_only=True)
class OrderedMethod(BlockMethod):
    """Put the video into an order, and cut it into blocks one after the other.

    Args:
        block_size: Tokens per block, a power of two in [16, 256].
        order: Order of the video tokens: ``"raster"``; ``"tile"``; ``"curve"``, along a space-filling curve;
            ``"token"``, all frames of one position together; or three axes, slowest first, such as ``"hwf"``.
        tile: ``(frames, height, width)`` tokens of a tile, each at least 1, for ``order="tile"``. Tiles follow each
            other without padding, so a block is a tile only where both have the same size.
    """

    block_size: BlockSize = 64
    order: Order = "raster"
    tile: Tile = (4, 4, 4)

    def layout(self, call: AttentionCall, device: torch.device, state: MethodState) -> TokenLayout:
        """Return the layout of a call, built once per make-up of the tokens.

        Tokens that come in order already (``call.tokens.ordered``) have a layout that changes nothing; ``video_order``
        says which they are all the same.

        Args:
            call: The call.
            device: Where it shall be.
            state: Keeps it.
        """
        key = ("layout", self.block_size, self.order, self.tile, call.tokens, device)
        return state.cache.static(key, lambda: self._build(call, device))

    def video_order(self, tokens: TokenSpec) -> Tensor:
        """List the video tokens, by their place in raster order, in the order that is cut into blocks: ``(n,)`` int64.

        Args:
            tokens: What the sequence is made up of.
        """
        return token_order(tokens.grid, self.order, self.tile)

    def shared_order(self, tokens: TokenSpec) -> Tensor | None:
        """Return the order, ``(n,)`` int64, if it leaves no gap between video and text, which starts on a block.

        Args:
            tokens: What the sequence is made up of, in raster order.
        """
        return order_without_gaps(tokens, self.video_order(tokens), block=self.block_size)

    def _build(self, call: AttentionCall, device: torch.device) -> TokenLayout:
        order = self.video_order(call.tokens)
        return TokenLayout.build(call.tokens, block=self.block_size, order=order, device=device)


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
        from .kernels.triton_lists import triton_mask

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
