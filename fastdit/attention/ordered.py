"""Base class of methods with a choice of token orders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ..layout import TokenLayout, order_without_gaps
from ..token_orders import ORDERS, token_order
from ..tokens import AttentionCall, TokenSpec
from .fields import Allowed, BlockSize, Tile
from .method import BlockMethod
from .state import MethodState

Order = Annotated[str, Allowed(f"one of {', '.join(ORDERS)}", ORDERS.__contains__)]


@dataclass(frozen=True, kw_only=True)
class OrderedMethod(BlockMethod):
    """Base class of methods that cut the video into blocks along a token order.

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
        """Return the layout of a call, built once per token spec.

        Tokens that come in order already (``call.tokens.ordered``) have a layout that changes nothing; ``video_order``
        says which they are all the same.

        Args:
            call: The call.
            device: Device of the result.
            state: Keeps it.
        """
        key = ("layout", self.block_size, self.order, self.tile, call.tokens, device)
        return state.cache.static(key, lambda: self._build(call, device))

    def video_order(self, tokens: TokenSpec) -> Tensor:
        """List the video tokens, by their place in raster order, in the order that is cut into blocks: ``(n,)`` int64.

        Args:
            tokens: The token spec of the sequence.
        """
        return token_order(tokens.grid, self.order, self.tile)

    def shared_order(self, tokens: TokenSpec) -> Tensor | None:
        """Return the order, ``(n,)`` int64, if it leaves no gap between video and text, which starts on a block."""
        return order_without_gaps(tokens, self.video_order(tokens), block=self.block_size)

    def _build(self, call: AttentionCall, device: torch.device) -> TokenLayout:
        order = self.video_order(call.tokens)
        return TokenLayout.build(call.tokens, block=self.block_size, order=order, device=device)
