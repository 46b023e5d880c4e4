"""Tiles whose shape each head chooses while the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from ...layout import TokenLayout, stack_heads
from ...token_orders import token_order
from ...tokens import AttentionCall
from ..fields import Allowed, BlockSize, Count, Density, Tile
from ..method import BlockMethod, register
from ..pattern import Pattern, pattern_of
from ..reorder import part_scores, pool_laid_out
from ..select import SCORES_AT_ONCE, by_heads, keep_top_k, top_count
from ..state import MethodState

Shapes = tuple[int, ...]
"""For each head of a sample the index of its tile."""

Tiles = Annotated[
    tuple[Tile, ...],
    Allowed("a tuple of one or more (frames, height, width), each at least 1", lambda value: len(value) > 0),
]


@register("profiled")
@dataclass(frozen=True, kw_only=True)
class Profiled(BlockMethod):
    """Attention to the heaviest tiles, whose shape each head chooses.

    Heads that look at a row, a column or one place in all frames need other tiles than those that look at what is near.
    In the first sparse call of a video each layer computes a few queries exactly, and with the blocks that it would
    choose in tiles of each shape; the shape that comes nearest stays for the video. Each sample of a batch chooses for
    itself, so samples are computed one after the other. Which blocks are computed is drafted as by ``draft``: from the
    means of parts of tiles, the same number in each row.

    Args:
        density: Fraction of blocks to keep in each row, in (0, 1].
        tiles: Shapes to choose from, ``(frames, height, width)`` tokens each. A block is a tile where both have the
            same size and the video is a multiple of it; elsewhere tiles follow each other without padding.
        block_size: Tokens per block, a power of two in [16, 256].
        parts: Runs of tokens that a block is cut into, each with a mean of its own, a divisor of ``block_size``.
        samples: Queries that are computed exactly to choose a shape, at least 1.

    Raises:
        ValueError: A block cannot be cut into so many parts.

    Source: fastdit. Profiling is that of Sparse VideoGen (arXiv 2502.01776), section 4, which chooses between two
        patterns; the draft that of DraftAttention (arXiv 2505.14708).
    """

    density: Density = 0.25
    tiles: Tiles = ((4, 4, 4), (1, 8, 8), (2, 4, 8), (4, 1, 16), (4, 16, 1))
    block_size: BlockSize = 64
    parts: Count = 8
    samples: Count = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size % self.parts:
            raise ValueError(f"parts must divide a block of {self.block_size} tokens, got {self.parts!r}; 8 is usual")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: MethodState) -> Tensor:
        """Compute the attention, in the first call of a video after each head has got its shape."""
        if len(q) > 1:
            return self._one_by_one(q, k, v, call, state)
        if _chosen(q, call, state) is None:
            with torch.no_grad():
                state.measure("choice", q.device, lambda: self._choose(q, k, v, call, state))
        return super().forward(q, k, v, call, state)

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        """Keep the best blocks of each row, in the tiles that each head has chosen.

        Raises:
            ValueError: Samples of the batch choose different shapes, so that there is no one pattern.
        """
        shapes = _chosen(q, call, state) or self._choose(q, k, k, call, state)
        if len(set(shapes)) > 1:
            raise ValueError(
                f"the {len(shapes)} samples of the batch choose different tiles; ask for the pattern of one at a time"
            )
        layouts = self._layouts(call, q.device, state)
        return self._draft(q, k, [layouts[i] for i in shapes[0]], call)

    def _one_by_one(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: MethodState) -> Tensor:
        """Compute each sample as it is computed alone, with shapes and a pattern of its own."""
        outs, states = [], []
        for i, sample in enumerate(zip(q.split(1), k.split(1), v.split(1), strict=True)):
            own = state.memory.setdefault(f"sample {i} of {len(q)}", replace(state, pattern=None, memory={}))
            own.refresh = state.refresh
            padding = None if call.key_padding is None else call.key_padding[i : i + 1]
            outs.append(self.forward(*sample, replace(call, key_padding=padding), own))
            states.append(own)
        state.kept = torch.stack([own.kept for own in states]).mean()
        return torch.cat(outs)

    def _draft(self, q: Tensor, k: Tensor, layouts: Sequence[TokenLayout], call: AttentionCall) -> Pattern:
        video = layouts[0].video_blocks
        count = top_count(self.density, video)

        def choose(part: slice) -> Tensor:
            own = stack_heads(layouts[part])
            return keep_top_k(part_scores(q[:, part], k[:, part], own, parts=self.parts, scale=_scale(q, call)), count)

        kept = by_heads(choose, q.shape[1], q.shape[0] * (video * self.parts) ** 2)
        # Padding is at the same places for all heads, so one list of lengths serves all.
        return Pattern(stack_heads(layouts), pattern_of(layouts[0], kept, max_count=count).mask)

    def _choose(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: MethodState) -> tuple[Shapes, ...]:
        video = call.tokens.video
        count = min(self.samples, call.tokens.grid.num_tokens)
        rows = torch.linspace(video.start, video.stop - 1, count, dtype=torch.float32, device=q.device).round().long()
        layouts = self._layouts(call, q.device, state)
        blocks = [self._draft(q, k, [layout] * q.shape[1], call).mask.to_dense() for layout in layouts]
        step = max(1, SCORES_AT_ONCE // (len(q) * count * k.shape[2]))
        errors = []
        for first in range(0, q.shape[1], step):
            part = slice(first, first + step)
            own = [(layout, of_all[:, part]) for layout, of_all in zip(layouts, blocks, strict=True)]
            errors.append(_errors(q[:, part, rows], k[:, part], v[:, part], rows, self, own, call))
        shapes = tuple(tuple(of_sample) for of_sample in torch.cat(errors, 2).argmin(0).tolist())
        state.memory["profiled"] = (call.tokens, q.shape[:2], shapes)
        return shapes

    def _layouts(self, call: AttentionCall, device: torch.device, state: MethodState) -> list[TokenLayout]:
        def build(tile: Tile) -> TokenLayout:
            order = token_order(call.tokens.grid, "tile", tile)
            return TokenLayout.build(call.tokens, block=self.block_size, order=order, device=device)

        key = ("profiled", self.block_size, call.tokens, device)
        return [state.cache.static((*key, tile), partial(build, tile)) for tile in self.tiles]


def _chosen(q: Tensor, call: AttentionCall, state: MethodState) -> tuple[Shapes, ...] | None:
    tokens, size, shapes = state.memory.get("profiled", (None, None, ()))
    return shapes if (tokens, size) == (call.tokens, q.shape[:2]) else None


def _errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    method: Profiled,
    choices: list[tuple[TokenLayout, Tensor]],
    call: AttentionCall,
) -> Tensor:
    """Return the squared error of each choice on a few queries: ``(choices, B, h)``.

    In fp32, or fp64 for fp64. The queries ``q``, ``(B, h, n, D)``, are the tokens ``rows``, ``(n,)`` int64; a choice
    is a layout and its blocks, ``(B, h, N, N)`` bool.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, values, scale = q.to(dtype), k.to(dtype), v.to(dtype), _scale(q, call)
    logits = q @ k.mT * scale
    if call.key_padding is not None:
        logits.masked_fill_(call.key_padding[:, None, None], -torch.inf)
    exact = logits.softmax(-1) @ values
    errors = []
    for layout, blocks in choices:
        block_of = layout.inverse[0] // layout.block
        listed = blocks[:, :, block_of[rows]]
        kept, of_kept = logits.masked_fill(~listed[..., block_of], -torch.inf), values
        if method.compensate is not None:
            means_k, means_v = (pool_laid_out(layout, x) for x in (k, v))
            more = q @ means_k.mT * scale + layout.block_lengths.to(dtype).log()
            kept = torch.cat([kept, more.masked_fill(listed, -torch.inf)], -1)
            of_kept = torch.cat([values, means_v], 2)
        errors.append((kept.softmax(-1) @ of_kept - exact).square().sum((2, 3)))
    return torch.stack(errors)


def _scale(q: Tensor, call: AttentionCall) -> float:
    return q.shape[-1] ** -0.5 if call.scale is None else call.scale
