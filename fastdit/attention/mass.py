"""Block sums of the exact attention map, computed a few rows at a time so that the map is never stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.device import takes_triton

MAX_ENTRIES = 1 << 25
"""Entries of the attention map that exist at once: 128 MiB in fp32."""
CACHED_ENTRIES = 1 << 19
"""As many as stay in the cache of a CPU, where a sum over blocks goes tile by tile."""


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


@torch.no_grad()
def block_mass(
    q: Tensor, k: Tensor, lse: Tensor | None, *, scale: float, block: int, lengths_q: Tensor, lengths_k: Tensor
) -> Tensor:
    """Sum the attention map over each pair of blocks.

    With a log-sum-exp of an earlier step the sums are no longer exactly normalised: a row of blocks adds up to about
    the number of its queries. No gradient flows through them. Arguments as for ``attention_rows``.

    Returns:
        ``(B, H, Nq, Nk)``, fp32 or better.

    Source: AdaSpa (arXiv 2502.21079), the second pass of its search.
    """
    shapes = {"scale": scale, "block": block, "lengths_q": lengths_q, "lengths_k": lengths_k}
    if takes_triton(q, k) and 16 <= q.shape[3] <= 128 and block in (16, 32, 64, 128, 256):
        from .kernels.triton.mass import triton_block_mass

        return triton_block_mass(q, k, lse, **shapes)
    dtype = torch.promote_types(q.dtype, torch.float32)
    mass = torch.empty(*q.shape[:2], lengths_q.shape[-1], lengths_k.shape[-1], dtype=dtype, device=q.device)
    if lse is not None:
        for b, h, rows, columns, part in _tiles(q, k, lse.to(dtype), **shapes):
            mass[b, h, rows, columns] = part
        return mass
    for (b, h, rows), weights in attention_rows(q, k, lse, **shapes):
        mass[b, h, rows] = weights.sum((1, 3))
    return mass


def _tiles(
    q: Tensor, k: Tensor, lse: Tensor, *, scale: float, block: int, lengths_q: Tensor, lengths_k: Tensor
) -> Iterator[tuple[int, int, slice, slice, Tensor]]:
    """Sum the map over blocks in tiles that fit a cache: sample, head, rows and columns of blocks, their sums."""
    batch, heads = q.shape[:2]
    num_q, num_k = lengths_q.shape[-1], lengths_k.shape[-1]
    within = torch.arange(block, device=q.device)
    no_query, no_key = (
        (within >= lengths.expand(batch, heads, -1)[..., None]).flatten(2) for lengths in (lengths_q, lengths_k)
    )
    entries = min(MAX_ENTRIES, CACHED_ENTRIES) if q.device.type == "cpu" else MAX_ENTRIES
    columns = min(num_k, max(1, entries // block**2))
    rows = min(num_q, max(1, entries // (columns * block**2)))
    tile = lse.new_empty(rows * columns * block**2)
    for b in range(batch):
        for h in range(heads):
            keys = _pad(k[b, h].to(lse.dtype) * scale, num_k * block).mT
            queries = _pad(q[b, h].to(lse.dtype), num_q * block).masked_fill(no_query[b, h, :, None], 0)
            # -inf makes the weights of padding rows 0
            shift = -_pad(lse[b, h, :, None], num_q * block).masked_fill(no_query[b, h, :, None], torch.inf)
            for top in range(0, num_q, rows):
                of_rows = slice(top * block, (top + rows) * block)
                for left in range(0, num_k, columns):
                    some = slice(left * block, (left + columns) * block)
                    shape = queries[of_rows].shape[0], keys[:, some].shape[1]
                    weights = tile[: shape[0] * shape[1]].view(shape)
                    torch.addmm(shift[of_rows], queries[of_rows], keys[:, some], out=weights).exp_()
                    of_keys = weights.view(-1, block, shape[1]).sum(1).masked_fill_(no_key[b, h, some], 0)
                    sums = of_keys.unflatten(1, (-1, block)).sum(-1)
                    yield b, h, slice(top, top + rows), slice(left, left + columns), sums


def _pad(x: Tensor, rows: int) -> Tensor:
    return F.pad(x, (0, 0, 0, rows - x.shape[0])) if rows > x.shape[0] else x
