"""The oracle: attention of listed blocks straight from its definition, on any device, in fp64 if asked."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...mask import BlockMask
from .means import block_means, dropped_blocks, log_sizes
from .options import Options


def available() -> str | None:
    """Return why this kernel cannot run on this machine: it always can."""
    return None


def check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options) -> str | None:
    """Return why this kernel cannot run for these arguments, or ``None``.

    Args:
        q: ``(B, H, Sq, D)`` queries.
        k: ``(B, H, Sk, D)`` keys.
        v: ``(B, H, Sk, D)`` values.
        mask: The blocks.
        options: How.
    """
    if options.precision is not None:
        return f"it has no precision {options.precision!r} yet"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options) -> tuple[Tensor, Tensor]:
    """Compute the attention of listed blocks, one head at a time, in fp32 or better.

    Args:
        q: ``(B, H, Sq, D)`` queries.
        k: ``(B, H, Sk, D)`` keys.
        v: ``(B, H, Sk, D)`` values.
        mask: The blocks.
        options: How.

    Returns:
        The output, ``(B, H, Sq, D)`` in the dtype of ``q``, and the natural log-sum-exp, ``(B, H, Sq)`` fp32 or fp64.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads = q.shape[:2]
    outs, lses = [], []
    for b in range(batch):
        for h in range(heads):
            one = (slice(b, b + 1), slice(h, h + 1))
            out, lse = _head(q[one].to(dtype), k[one].to(dtype), v[one].to(dtype), _one_head(mask, b, h), options)
            outs.append(out)
            lses.append(lse)
    out = torch.cat(outs).unflatten(0, (batch, heads))[:, :, 0].to(q.dtype)
    return out, torch.cat(lses).unflatten(0, (batch, heads))[:, :, 0]


def _head(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options) -> tuple[Tensor, Tensor]:
    visible = mask.to_tokens(q.shape[2], k.shape[2])
    scores = (q @ k.mT * options.scale).masked_fill(~visible, -torch.inf)
    if options.compensate == "mean":
        dropped = dropped_blocks(mask).repeat_interleave(mask.block_q, 2)[:, :, : q.shape[2]]
        stand_ins = q @ block_means(k, mask).mT * options.scale + log_sizes(mask, q.dtype)[:, :, None]
        scores = torch.cat([scores, stand_ins.masked_fill(~dropped, -torch.inf)], -1)
        v = torch.cat([v, block_means(v, mask)], 2)
    some = (scores > -torch.inf).any(-1)
    # An empty row is all -inf, of which softmax and logsumexp have no gradient; give them zeros and overwrite.
    scores = torch.where(some[..., None], scores, 0)
    out = torch.where(some[..., None], scores.softmax(-1) @ v, 0)
    return out, torch.where(some, scores.logsumexp(-1), -torch.inf)


def _one_head(mask: BlockMask, b: int, h: int) -> BlockMask:
    def cut(x: Tensor) -> Tensor:
        rows = x[b : b + 1] if x.shape[0] > 1 else x
        return rows[:, h : h + 1] if x.shape[1] > 1 else rows

    names = ("indices", "counts", "full_counts", "lengths_q", "lengths_k")
    return replace(mask, **{name: cut(getattr(mask, name)) for name in names})
