"""Which blocks a head computes, where its plan says so whatever the video."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..attention import MethodState, Pattern
from ..attention.methods.paro.masks import ParoPlan
from ..tokens import AttentionCall, TokenSpec
from .plan import Plan

_FINE = 1 << 20
"""Steps of a run so long that one of them is in the middle of any bucket."""


@dataclass(frozen=True, eq=False)
class HeadMap:
    """Hold what one head computes.

    Args:
        blocks: ``(Nq, Nk)`` bool, the blocks computed, in the order in which the head takes its tokens.
        frames: ``(F, F)`` fp64 in [0, 1], the fraction of pairs computed between the tokens of two frames.
    """

    blocks: Tensor
    frames: Tensor


def head_map(plan: Plan, title: str, bucket: int, layer: int, head: int) -> HeadMap | None:
    """Return what a head computes, ``None`` where that depends on the video.

    Args:
        plan: The plan.
        title: The transformer.
        bucket: Index of the step bucket, from 0.
        layer: Index of the layer, from 0.
        head: Index of the head, from 0.
    """
    found = plan.transformers[title]
    method = plan.candidates[found.choices[bucket][layer][head]]
    calibrated = any(isinstance(getattr(method, f.name), ParoPlan) for f in fields(method))
    if not (method.static or calibrated):
        return None
    start = plan.buckets[bucket - 1] if bucket else 0.0
    call = AttentionCall(
        plan.tokens,
        layer=layer,
        num_layers=found.layers,
        step=int((start + plan.buckets[bucket]) / 2 * _FINE),
        num_steps=_FINE,
        heads=(head,),
    )
    nothing = torch.zeros(1, 1, 1, 1).expand(1, 1, plan.tokens.num_tokens, 1)
    return _map_of(method.pattern(nothing, nothing, call, MethodState()), plan.tokens)


def head_maps(plan: Plan, title: str, layer: int, head: int) -> Iterator[tuple[int, int, HeadMap | None]]:
    """Return what a head computes, once for all step buckets in which it has the same method.

    Args:
        plan: The plan.
        title: The transformer.
        layer: Index of the layer, from 0.
        head: Index of the head, from 0.

    Returns:
        The first and the last of the step buckets, and their map, as ``head_map`` returns it.
    """
    choices = [bucket[layer][head] for bucket in plan.transformers[title].choices]
    first = 0
    for bucket, choice in enumerate(choices):
        if bucket + 1 == len(choices) or choices[bucket + 1] != choice:
            yield first, bucket, head_map(plan, title, first, layer, head)
            first = bucket + 1


def _map_of(pattern: Pattern, tokens: TokenSpec) -> HeadMap:
    mask, index = pattern.mask, pattern.layout.index[0]
    blocks = mask.to_dense()[0, 0]
    queries, keys = (_frames_of(index, block, tokens) for block in (mask.block_q, mask.block_k))
    return HeadMap(blocks, queries.T @ blocks.double() @ keys / tokens.grid.frame_tokens**2)


def _frames_of(index: Tensor, block: int, tokens: TokenSpec) -> Tensor:
    """Count the tokens of each frame in each block, ``(N, F)`` fp64."""
    video = tokens.video
    count = -(-len(index) // block)
    real = (index >= video.start) & (index < video.stop)
    frame = (index - video.start) // tokens.grid.frame_tokens
    place = torch.arange(len(index)) // block * tokens.grid.frames + frame
    total = place[real].bincount(minlength=count * tokens.grid.frames)
    return total.view(count, tokens.grid.frames).double()
