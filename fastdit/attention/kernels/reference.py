"""Reference kernel: block-sparse attention straight from its definition, on any device, up to fp64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...mask import BlockMask
from .means import block_means
from .options import Options
from .quantize import int8_products, quantize_channels, round_weights, smooth_keys
from .stand_ins import dropped_blocks, log_sizes


def available() -> str | None:
    """Return why this kernel cannot run on this machine: it always can."""
    return None


def check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options) -> str | None:
    """Return why this kernel cannot run for these arguments: it always can."""
    if options.variant is not None:
        return f"it has no variants, got variant={options.variant!r}"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options) -> tuple[Tensor, Tensor]:
    """Compute the attention of listed blocks, one head at a time, in fp32 or better."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads = q.shape[:2]
    if options.index is not None:
        q, k, v = (_gather(x, options.index) for x in (q, k, v))
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
    tokens_q, tokens_k, offset = q.shape[2], k.shape[2], 0
    if options.precision is None:
        products = q @ k.mT
    else:
        k, mean = smooth_keys(k, mask)
        products, offset = int8_products(q, k, mask), q @ mean.mT * options.scale
    scores = (products * options.scale).masked_fill(~mask.to_tokens(tokens_q, tokens_k), -torch.inf)
    added, means = scores[..., :0], v[:, :, :0]
    if options.compensate == "mean":
        dropped = dropped_blocks(mask).repeat_interleave(mask.block_q, 2)[:, :, :tokens_q]
        added = q @ block_means(k, mask).mT * options.scale + log_sizes(mask, q.dtype)[:, :, None]
        added, means = added.masked_fill(~dropped, -torch.inf), block_means(v, mask)
    scores = torch.cat([scores, added], -1)
    some = (scores > -torch.inf).any(-1, keepdim=True)
    # Softmax and logarithm of an all -inf row have no gradient: compute with zeros and overwrite the result.
    scores = torch.where(some, scores, 0)
    top = scores.detach().amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    listed, stand_ins = weights[..., :tokens_k], weights[..., tokens_k:]
    if options.precision == "int8_fp8":
        v8, scales = quantize_channels(v, mask)
        listed, v = round_weights(listed), v8.to(v.dtype) * scales
    out = torch.where(some, (listed @ v + stand_ins @ means) / total, 0)
    return out, torch.where(some, total.log() + top + offset, -torch.inf)[..., 0]


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Put tokens in order, with zeros for padding: ``(B, H, n, D)``."""
    tokens = index.clamp(min=0)[None, :, :, None].expand(*x.shape[:2], -1, x.shape[3])
    return x.gather(2, tokens).masked_fill((index < 0)[None, :, :, None], 0)


def _one_head(mask: BlockMask, b: int, h: int) -> BlockMask:
    def cut(x: Tensor) -> Tensor:
        rows = x[b : b + 1] if x.shape[0] > 1 else x
        return rows[:, h : h + 1] if x.shape[1] > 1 else rows

    names = ("indices", "counts", "full_counts", "lengths_q", "lengths_k")
    return replace(mask, **{name: cut(getattr(mask, name)) for name in names})
