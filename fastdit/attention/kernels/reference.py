"""The oracle: attention of listed blocks straight from its definition, on any device, in fp64 if asked."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...mask import BlockMask


def available() -> str | None:
    """Return why this kernel cannot run on this machine: it always can."""
    return None


def check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> str | None:
    """Return why this kernel cannot run for these arguments: it always can.

    Args:
        q: ``(B, H, Sq, D)`` queries.
        k: ``(B, H, Sk, D)`` keys.
        v: ``(B, H, Sk, D)`` values.
        mask: The blocks.
    """
    return None


def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    """Compute the attention of listed blocks, one head at a time, in fp32 or better.

    Args:
        q: ``(B, H, Sq, D)`` queries.
        k: ``(B, H, Sk, D)`` keys.
        v: ``(B, H, Sk, D)`` values.
        mask: The blocks.
        scale: Softmax scale.

    Returns:
        The output, ``(B, H, Sq, D)`` in the dtype of ``q``, and the natural log-sum-exp, ``(B, H, Sq)`` fp32 or fp64.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads = q.shape[:2]
    outs, lses = [], []
    for b in range(batch):
        for h in range(heads):
            out, lse = _head(q[b, h].to(dtype), k[b, h].to(dtype), v[b, h].to(dtype), _one_head(mask, b, h), scale)
            outs.append(out)
            lses.append(lse)
    out = torch.stack(outs).unflatten(0, (batch, heads)).to(q.dtype)
    return out, torch.stack(lses).unflatten(0, (batch, heads))


def _head(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    visible = mask.to_tokens(q.shape[0], k.shape[0])[0, 0]
    scores = (q @ k.mT * scale).masked_fill(~visible, -torch.inf)
    some = visible.any(-1)
    # An empty row is all -inf, of which softmax and logsumexp have no gradient; give them zeros and overwrite.
    scores = torch.where(some[:, None], scores, 0)
    out = torch.where(some[:, None], scores.softmax(-1) @ v, 0)
    return out, torch.where(some, scores.logsumexp(-1), -torch.inf)


def _one_head(mask: BlockMask, b: int, h: int) -> BlockMask:
    def cut(x: Tensor) -> Tensor:
        rows = x[b : b + 1] if x.shape[0] > 1 else x
        return rows[:, h : h + 1] if x.shape[1] > 1 else rows

    names = ("indices", "counts", "full_counts", "lengths_q", "lengths_k")
    return replace(mask, **{name: cut(getattr(mask, name)) for name in names})
