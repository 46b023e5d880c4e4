"""AdaSpa: blocks chosen from the exact attention map of an earlier step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ...layout import TokenLayout
from ...tokens import AttentionCall
from ..fields import Allowed, Density
from ..kernels.dispatch import block_sparse_attention
from ..mass import block_mass
from ..method import register
from ..ordered import OrderedMethod
from ..pattern import Pattern, pattern_of
from ..reorder import lay_out, put_back
from ..select import by_heads, keep_top_k, top_count
from ..state import MethodState

Recall = Annotated[
    float,
    Allowed(
        "in [0, 1]",
        lambda value: 0 <= value <= 1,
        "the paper's is 0.8, and adaptive=False gives all heads the same density",
    ),
]


@register("adaspa")
@dataclass(frozen=True, kw_only=True)
class AdaSpa(OrderedMethod):
    """Attention to the blocks with the largest exact attention mass, searched at a few steps and kept in between.

    The first search of a video is a full attention, which is the result of that call, and a second pass over queries
    and keys that sums the attention map over blocks. Later searches reuse the log-sum-exp of the first, which changes
    little from step to step, and are the second pass alone. The schedule says when to search; the paper's
    is ``Schedule(warmup_steps=10, refresh_steps=(10, 30))`` for 50 steps.

    In each head every row of blocks keeps the same number of key blocks, those with the largest mass per key, so
    that a block cut off at the end competes by what its keys weigh.

    Args:
        density: Fraction of block pairs to keep on average over the heads, in (0, 1]; text comes on top.
        adaptive: Whether heads whose kept blocks hold more than ``recall_threshold`` of the mass give half of their
            blocks to as many heads whose blocks hold least. At most half of the heads give.
        recall_threshold: Fraction of the attention mass, in [0, 1].

    Source: AdaSpa (arXiv 2502.21079): its search with cached log-sum-exp and its head-adaptive budgets.
    """

    density: Density = 0.2
    adaptive: bool = True
    recall_threshold: Recall = 0.8

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        """Keep the heaviest blocks of each row, by the log-sum-exp remembered or, without one, by that of this call."""
        layout = self.layout(call, q.device, state)
        q, k = lay_out(layout, q, k)
        lse = _remembered(q, call, state)
        if lse is None:
            _, lse = self._attend(q, k, k, layout, call, state)
        lengths = layout.lengths()[None] if call.key_padding is None else layout.lengths_without(call.key_padding)
        video = layout.video_blocks
        base = top_count(self.density, video)
        step = min(base // 2, video - base) if self.adaptive else 0  # limited above a density of 2/3
        recall = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)

        def choose(heads: slice) -> Tensor:
            mass = block_mass(
                q[:, heads],
                k[:, heads],
                lse[:, heads],
                scale=q.shape[-1] ** -0.5 if call.scale is None else call.scale,
                block=self.block_size,
                lengths_q=_of_heads(lengths, heads),
                lengths_k=_of_heads(lengths, heads),
            )
            total, mass = mass.sum((-1, -2)), mass[..., :video, :video]
            scores = mass / _of_heads(lengths, heads)[..., None, :video]
            kept = keep_top_k(scores, base)
            recall[:, heads] = 1 - mass.masked_fill(kept, 0).sum((-1, -2)) / total
            if step == 0:
                return kept
            # The number of budgets that keep a block; larger budgets keep all that smaller ones do.
            return keep_top_k(scores, base - step).to(torch.uint8) + kept + keep_top_k(scores, base + step)

        blocks = by_heads(choose, q.shape[1], q.shape[0] * layout.num_blocks**2)
        if step:
            level = levels(recall, self.recall_threshold)[..., None, None]
            blocks = blocks >= 2 - level
        return pattern_of(layout, blocks, max_count=base + step)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: MethodState) -> Tensor:
        """Compute the attention of the pattern; at the first search of a video, full attention."""
        layout = self.layout(call, q.device, state)
        if _remembered(q, call, state) is not None:
            return super().forward(q, k, v, call, state)
        laid_q, laid_k, laid_v = state.measure("order", q.device, lambda: lay_out(layout, q, k, v))
        out, _ = self._attend(laid_q, laid_k, laid_v, layout, call, state)
        state.pattern = None
        self.resolve(q, k, call, state)
        return state.measure("order", q.device, lambda: put_back(layout, out))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, call: AttentionCall, state: MethodState
    ) -> tuple[Tensor, Tensor]:
        """Attend to everything, remember the log-sum-exp, return the output and it: ``(B, H, S, D)``, ``(B, H, S)``."""
        video = layout.video_blocks
        every = pattern_of(layout, torch.ones(video, video, dtype=torch.bool, device=q.device), max_count=video)
        mask = state.mask(every, call)
        state.kept = mask.kept
        precision = state.precision_of(q, k, v, mask)
        out, lse = block_sparse_attention(q, k, v, mask, scale=call.scale, kernel=state.kernel, precision=precision)
        state.memory["lse"] = (call.tokens, lse.detach())
        return out, lse.detach()


def _remembered(q: Tensor, call: AttentionCall, state: MethodState) -> Tensor | None:
    tokens, lse = state.memory.get("lse", (None, None))
    fits = lse is not None and tokens == call.tokens and lse.shape[:2] == q.shape[:2] and lse.device == q.device
    return lse if fits else None


def _of_heads(x: Tensor, heads: slice) -> Tensor:
    return x if x.shape[1] == 1 else x[:, heads]


def levels(recall: Tensor, threshold: float) -> Tensor:
    """Let heads that need fewer blocks give some, and as many heads that hold least get them.

    The paper's sparsities (1 + s) / 2 for those that give and (3 s - 1) / 2 for those that get are, as densities
    with d = 1 - s, d / 2 and 3/2 d: one step of d / 2 down and up, which leaves the average over the heads as it is.

    Args:
        recall: ``(B, H)`` share of the attention mass that the kept blocks hold, in [0, 1].
        threshold: The recall above which a head gives, in [0, 1]; at most half of the heads do, those with the largest.

    Returns:
        ``(B, H)`` int64: -1 for a head that gives, 1 for one that gets, 0 for the others.

    Source: AdaSpa (arXiv 2502.21079), head-adaptive hierarchical block sparsity.
    """
    heads = recall.shape[-1]
    givers = (recall > threshold).sum(-1, keepdim=True).clamp(max=heads // 2)
    place = recall.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (place >= heads - givers).long() - (place < givers).long()
