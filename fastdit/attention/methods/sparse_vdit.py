"""Sparse-vDiT's fixed patterns: bands, stripes, and heads that are left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...layout import TokenLayout
from ...mask import BlockMask
from ...tokens import AttentionCall
from ..fields import Density
from ..method import AttentionMethod, register
from ..ordered import OrderedMethod
from ..pattern import Pattern, pattern_of
from ..state import MethodState

BLOCK = 128
GOLDEN = (5**0.5 - 1) / 2


@register("diagonal")
@dataclass(frozen=True, kw_only=True)
class Diagonal(OrderedMethod):
    """A band around each query: in raster order the same frame, or its nearest rows.

    The band is as wide in blocks as ``density`` asks for. At its outermost distance only some block pairs, evenly
    spread over the sequence, are kept, so that the fraction is met on small grids too. A block's own keys are always
    kept.

    Args:
        density: Fraction of (query, key) pairs of the video to keep, in (0, 1]; text comes on top.

    Source: Sparse-vDiT (arXiv 2506.03065), pattern "diagonal". Band widths and block size are not published.
    """

    static: ClassVar[bool] = True

    density: Density = 0.25

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        layout = self.layout(call, q.device, state)
        position = torch.arange(layout.video_blocks, device="cpu")
        distance = (position[:, None] - position).abs()
        rank = distance + _spread(layout.video_blocks)[torch.minimum(position[:, None], position)]
        return pattern_of(layout, _keep_lowest(rank, layout, self.density).to(q.device))


@register("multi_diagonal")
@dataclass(frozen=True, kw_only=True)
class MultiDiagonal(Diagonal):
    """Nearby positions in all frames: a band with all frames of one position together.

    In raster order such a band is one diagonal for each distance between two frames. It is ``diagonal`` in another
    order, and its fields are the same.

    Args:
        order: As for ``diagonal``.

    Source: Sparse-vDiT (arXiv 2506.03065), pattern "multi-diagonal".
    """

    order: str = "token"


@register("vertical_stripe")
@dataclass(frozen=True, kw_only=True)
class VerticalStripe(OrderedMethod):
    """The same few key blocks for every query, and the query's own block.

    The key blocks are spread evenly over the video, the first one included, at distances that vary a little, so that
    they never fall into step with the frames. In other orders than raster they are other parts of the video: with
    ``order="token"``, say, a few positions in all frames.

    Args:
        density: Fraction of (query, key) pairs of the video to keep, in (0, 1]; text comes on top.

    Source: Sparse-vDiT (arXiv 2506.03065), pattern "vertical stripe". Which columns it takes is not published.
    """

    static: ClassVar[bool] = True

    density: Density = 0.25

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        layout = self.layout(call, q.device, state)
        rank = _spread(layout.video_blocks).repeat(layout.video_blocks, 1)
        return pattern_of(layout, _keep_lowest(rank, layout, self.density).to(q.device))


@register("skip")
@dataclass(frozen=True, kw_only=True)
class Skip(AttentionMethod):
    """Skipped heads: their output is zeros, for text too, and nothing is computed.

    It is meant for the few heads of a plan whose output hardly matters, not for a whole model. No gradient flows.

    Source: Sparse-vDiT (arXiv 2506.03065), mode "skip".
    """

    static: ClassVar[bool] = True
    empty: ClassVar[bool] = True

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        """Keep no block: the only pattern whose queries attend to nothing."""
        layout = TokenLayout.build(call.tokens, block=BLOCK, device=q.device)
        lengths = layout.block_lengths[None]
        indices = torch.zeros(1, 1, layout.num_blocks, 1, dtype=torch.int32, device=q.device)
        none = indices[..., 0]
        every = torch.arange(layout.num_blocks, dtype=torch.int32, device=q.device)
        return Pattern(layout, BlockMask(indices, none, none, every, lengths, lengths, BLOCK, BLOCK))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: MethodState) -> Tensor:
        state.kept = torch.zeros((), dtype=torch.float32, device=q.device)
        return torch.zeros_like(q)


def _spread(count: int) -> Tensor:
    """Rank positions, ``(count,)`` fp64 in [0, 1), so that those below any threshold are spread evenly.

    By the additive recurrence of the golden ratio: unlike a fixed distance, its gaps, of at most three sizes, do not
    fall into step with the rows or frames of a video, by which some places would never be seen.
    """
    return torch.arange(count, dtype=torch.float64, device="cpu") * GOLDEN % 1


def _keep_lowest(rank: Tensor, layout: TokenLayout, density: float) -> Tensor:
    """Keep the video blocks of lowest rank, ``(M, M)`` bool, their real pairs as near to a density as can be.

    Blocks of equal rank are kept or left out together; each block's own keys come before all others.
    """
    rank = rank.clone().fill_diagonal_(-1.0)
    lengths = layout.block_lengths[0, : layout.video_blocks].cpu().double()
    ranks, order = rank.flatten().sort()
    pairs = torch.outer(lengths, lengths).flatten()[order].cumsum(0)
    last = torch.cat([ranks[1:] > ranks[:-1], torch.ones(1, dtype=torch.bool, device="cpu")])
    nearest = (pairs[last] - density * pairs[-1]).abs().argmin()
    return rank <= ranks[last][nearest]
