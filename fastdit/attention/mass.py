"""The exact attention map, summed over blocks: row by row of blocks, so that it never exists as a whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ENTRIES = 1 << 25
"""Entries of the attention map that exist at once: 128 MiB in fp32."""


def attention_rows(
    q: Tensor, k: Tensor, lse: Tensor | None, *, scale: float, block: int, lengths_q: Tensor, lengths_k: Tensor
) -> Iterator[tuple[tuple[int, int, slice], Tensor]]:
    """Compute the attention map a few rows of blocks at a time, in fp32 or better.

    Args:
        q: ``(B, H, Sq, D)`` queries, laid out in blocks; the last one may be cut off.
        k: ``(B, H, Sk, D)`` keys, likewise.
        lse: ``(B, H, Sq)`` log-sum-exp of each row in natural log, of this call or an earlier one; ``None`` takes that
            of the keys given.
        scale: Softmax scale.
        block: Tokens per block, at least 1.
        lengths_q: ``(B or 1, H or 1, Nq)`` real queries of each block, which come first.
        lengths_k: ``(B or 1, H or 1, Nk)`` real keys of each block, likewise.

    Yields:
        Sample, head and rows of blocks, and the map there, ``(rows, block, Nk, block)``; 0 where there is padding.
    """
    batch, heads = q.shape[:2]
    num_q, num_k = lengths_q.shape[-1], lengths_k.shape[-1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    lengths_q, lengths_k = lengths_q.expand(batch, heads, -1), lengths_k.expand(batch, heads, -1)
    within = torch.arange(block, device=q.device)
    step = max(1, MAX_ENTRIES // (block * block * num_k))
    for b in range(batch):
        for h in range(heads):
            keys = _pad(k[b, h].to(dtype) * scale, num_k * block).mT
            no_key = (within >= lengths_k[b, h, :, None]).flatten()
            for first in range(0, num_q, step):
                rows = slice(first, min(first + step, num_q))
                tokens = slice(rows.start * block, rows.stop * block)
                scores = (q[b, h, tokens].to(dtype) @ keys).masked_fill_(no_key, -torch.inf)
                weights = scores.softmax(-1) if lse is None else scores.sub_(lse[b, h, tokens, None]).exp_()
                weights = _pad(weights, (rows.stop - rows.start) * block).view(-1, block, num_k, block)
                no_query = within >= lengths_q[b, h, rows, None]
                yield (b, h, rows), weights.masked_fill_(no_query[..., None, None], 0)


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor | None, *, scale: float, block: int, lengths_q: Tensor, lengths_k: Tensor
) -> Tensor:
    """Sum the attention map over each pair of blocks.

    With a log-sum-exp of an earlier step the sums are no longer exactly normalised: a row of blocks adds up to about
    the number of its queries.

    Args:
        q: ``(B, H, Sq, D)`` queries, laid out in blocks; the last one may be cut off.
        k: ``(B, H, Sk, D)`` keys, likewise.
        lse: ``(B, H, Sq)`` log-sum-exp of each row in natural log, of this call or an earlier one; ``None`` takes that
            of the keys given.
        scale: Softmax scale.
        block: Tokens per block, at least 1.
        lengths_q: ``(B or 1, H or 1, Nq)`` real queries of each block, which come first.
        lengths_k: ``(B or 1, H or 1, Nk)`` real keys of each block, likewise.

    Returns:
        ``(B, H, Nq, Nk)``, fp32 or better.

    Source: AdaSpa (arXiv 2502.21079), the second pass of its search.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    mass = torch.empty(*q.shape[:2], lengths_q.shape[-1], lengths_k.shape[-1], dtype=dtype, device=q.device)
    shapes = {"scale": scale, "block": block, "lengths_q": lengths_q, "lengths_k": lengths_k}
    for (b, h, rows), weights in attention_rows(q, k, lse, **shapes):
        mass[b, h, rows] = weights.sum((1, 3))
    return mass


def _pad(x: Tensor, rows: int) -> Tensor:
    return F.pad(x, (0, 0, 0, rows - x.shape[0])) if rows > x.shape[0] else x
