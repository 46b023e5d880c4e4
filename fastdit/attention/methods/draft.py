"""DraftAttention: tiles chosen from a low-resolution attention map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ...layout import TokenLayout, order_without_gaps
from ...token_orders import fitting_tile, tile_order
from ...tokens import AttentionCall, TokenSpec, VideoGrid
from ..fields import Allowed, Count, Density, Tile
from ..method import BlockMethod, register
from ..pattern import Pattern, pattern_of
from ..reorder import part_scores, pool_laid_out
from ..select import by_heads, keep_top_fraction, keep_top_k, top_count
from ..state import MethodState

PUBLISHED_TILE = (1, 8, 16)

DraftTile = Annotated[
    Tile,
    Allowed(
        "(frames, height, width) with 1 to 256 tokens in all",
        lambda value: math.prod(value) <= 256,
        "(1, 8, 16) and (1, 8, 8) are usual",
    ),
]


@register("draft")
@dataclass(frozen=True, kw_only=True)
class Draft(BlockMethod):
    """Attention to the tile pairs that carry most of a low-resolution attention map.

    Queries and keys are averaged over tiles of the video; per head, the largest entries of the draft map as a whole
    are kept, so busy tiles get more keys than quiet ones. Tokens are computed tile by tile. Tiles cut off at the end
    of an axis are pooled over the tokens that they have, and count for as many.

    Args:
        density: Fraction of tile pairs to keep, in (0, 1]. The paper keeps 0.25 (Wan 2.1) and 0.1 (HunyuanVideo).
        tile: ``(frames, height, width)`` tokens of a tile, at most 256 in all; (1, 8, 16) in the paper. ``None`` takes
            the shape of at most 128 tokens of one frame that suits the grid best (``layout.fitting_tile``): tiles cut
            off cost as much as whole ones, which on small frames is most of the work.
        per_row: Keep the fraction in each row of the map, so that all tiles get equally many keys; not in the paper.
        parts: Runs of tokens that a tile is cut into, each with a mean of its own, a power of two up to the tokens
            of a block. More find more of the attention, and the map costs their square; 1 in the paper.

    Raises:
        ValueError: A block cannot be cut into so many parts.

    Source: DraftAttention (arXiv 2505.14708), section 3, and its released code.
    """

    density: Density = 0.25
    tile: DraftTile | None = None
    per_row: bool = False
    parts: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size % self.parts:
            raise ValueError(f"parts must divide a block of {self.block_size} tokens, got {self.parts!r}; 8 is usual")

    @property
    def block_size(self) -> int:
        """Return the tokens per block: those of a tile, padded to a power of two of at least 16."""
        return max(16, 1 << (math.prod(self.tile or PUBLISHED_TILE) - 1).bit_length())

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        """Draft the attention map and keep its largest entries."""
        key = ("draft", self.tile, call.tokens, q.device)
        layout = state.cache.static(key, lambda: self._layout(call, q.device))
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        tiles = layout.video_blocks
        if self.parts == 1:
            draft_q, draft_k = (pool_laid_out(layout, x)[:, :, :tiles] for x in (q, k))
            log_sizes = layout.block_lengths[0, :tiles].float().log()

        def scores(part: slice) -> Tensor:
            if self.parts > 1:
                return part_scores(q[:, part], k[:, part], layout, parts=self.parts, scale=scale)
            logits = draft_q[:, part] @ draft_k[:, part].mT * scale + log_sizes
            # ranks as the softmax does, which would underflow to ties
            return logits if self.per_row else logits.log_softmax(-1)

        def choose(part: slice) -> Tensor:
            if self.per_row:
                return keep_top_k(scores(part), top_count(self.density, tiles))
            return keep_top_fraction(scores(part), self.density)

        # a share of the whole map may give a row any number of blocks
        max_count = top_count(self.density, tiles) if self.per_row else tiles
        kept = by_heads(choose, q.shape[1], q.shape[0] * (tiles * self.parts) ** 2)
        return pattern_of(layout, kept, max_count=max_count)

    def shared_order(self, tokens: TokenSpec) -> Tensor | None:
        """Return the order of the tiles, ``(n,)`` int64, if each of them fills its block."""
        order, sizes = self._tiles(tokens.grid)
        return order_without_gaps(tokens, order, block=self.block_size, segments=sizes)

    def _tiles(self, grid: VideoGrid) -> tuple[Tensor, Tensor]:
        return tile_order(grid, fitting_tile(grid, PUBLISHED_TILE) if self.tile is None else self.tile)

    def _layout(self, call: AttentionCall, device: torch.device) -> TokenLayout:
        order, sizes = self._tiles(call.tokens.grid)
        return TokenLayout.build(call.tokens, block=self.block_size, order=order, segments=sizes, device=device)
