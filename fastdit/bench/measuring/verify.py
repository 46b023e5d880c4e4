"""Verification of results: sampled rows against fp64, within the error of eager attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ...mask import BlockMask

ROWS = 24
"""Queries of a head that are computed again."""

UNINITIALISED = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"))
"""Functions that return uninitialised tensors."""

INEXACT = 0.1
"""Largest relative L2 error of kernels whose products are of low precision."""


def fault(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, *, exact: bool = True, seed: int = 0
) -> str | None:
    """Say what is wrong with a result, or ``None``.

    The first and last real row of each head and others at random are computed in fp64, and in the dtype of the inputs:
    the result may be off by twice the error of the latter, plus rounding. Everything else must be finite.

    Args:
        out: ``(B, H, Sq, D)``, what is checked.
        q: ``(B, H, Sq, D)`` queries.
        k: ``(B, H, Sk, D)`` keys.
        v: ``(B, H, Sk, D)`` values.
        mask: The blocks that count; ``None`` for all.
        exact: Whether the products are of the precision of the inputs; otherwise 10 % of relative error may be.
        seed: Random seed of the rows.
    """
    if out.shape != q.shape:
        return f"its shape is {tuple(out.shape)}, not {tuple(q.shape)}"
    rows = sample_rows(q, mask, seed)
    error = torch.zeros((), dtype=torch.float64, device=q.device)
    eager, wrong, norm = error.clone(), error.clone(), error.clone()
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            head = out[b, h]
            real = head if mask is None else head[_real(mask, b, h, q.shape[2])]
            if not torch.isfinite(real).all():
                return f"sample {b}, head {h} has NaN or Inf"
            visible = None if mask is None else visible_keys(mask, b, h, rows, k.shape[2])
            truth = _attend(q[b, h, rows].double(), k[b, h].double(), v[b, h].double(), visible)
            low = _attend(q[b, h, rows], k[b, h], v[b, h], visible)
            difference = head[rows].double() - truth
            error = torch.maximum(error, difference.abs().max())
            eager = torch.maximum(eager, (low.double() - truth).abs().max())
            wrong, norm = wrong + difference.square().sum(), norm + truth.square().sum()
    relative = float((wrong / norm).sqrt())
    if not exact:
        return None if relative <= INEXACT else f"relative error {relative:.3g}, allowed {INEXACT}"
    budget = float(2 * eager) + 8 * torch.finfo(q.dtype).eps
    return (
        None if float(error) <= budget else f"error {float(error):.3g}, allowed {budget:.3g} (relative {relative:.3g})"
    )


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN, so that what a kernel does not write shows."""
    with ExitStack() as stack:
        for owner, name in UNINITIALISED:
            stack.enter_context(patch.object(owner, name, poisoned(getattr(owner, name))))
        yield


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Fill with NaN what a function returns, if it is floating point.

    Args:
        make: The function, one of ``UNINITIALISED``.
    """

    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        out = make(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    return wrapped


def sample_rows(q: Tensor, mask: BlockMask | None, seed: int) -> Tensor:
    """Choose the rows that are checked, real in every sample and head: ``(n,)`` int64.

    Args:
        q: ``(B, H, Sq, D)`` queries.
        mask: The blocks; ``None`` if all queries are real.
        seed: Random seed of the rows.
    """
    real = torch.ones(q.shape[2], dtype=torch.bool)
    if mask is not None:
        within = torch.arange(mask.block_q) < mask.lengths_q.cpu()[..., None]
        real = within.flatten(2).flatten(0, 1).all(0)[: q.shape[2]]
    known = real.nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    some = known[torch.randperm(len(known), generator=generator)[: ROWS - 2]]
    return torch.cat([known[:1], known[-1:], some]).unique().to(q.device)


def visible_keys(mask: BlockMask, b: int, h: int, rows: Tensor, tokens_k: int) -> Tensor:
    """Return which keys some queries attend to: ``(n, tokens_k)`` bool.

    Args:
        mask: The blocks.
        b: Index of the sample.
        h: Index of the head.
        rows: ``(n,)`` int64 queries.
        tokens_k: Keys, padding included.
    """
    indices = mask.indices[b % mask.indices.shape[0], h % mask.indices.shape[1]]
    counts = mask.counts[b % mask.counts.shape[0], h % mask.counts.shape[1]]
    lengths = mask.lengths_k[b % mask.lengths_k.shape[0], h % mask.lengths_k.shape[1]]
    offsets = torch.arange(mask.block_k, device=mask.device)
    out = torch.zeros(len(rows), mask.num_k, mask.block_k, dtype=torch.bool, device=mask.device)
    for i, block in enumerate((rows // mask.block_q).tolist()):
        count = int(counts[block])
        listed = mask.every if count == mask.num_k else indices[block, :count]
        out[i, listed.long()] = offsets < lengths[listed.long(), None]
    return out.flatten(1)[:, :tokens_k]


def _real(mask: BlockMask, b: int, h: int, tokens_q: int) -> Tensor:
    lengths = mask.lengths_q[b % mask.lengths_q.shape[0], h % mask.lengths_q.shape[1]]
    offsets = torch.arange(mask.block_q, device=mask.device)
    return (offsets < lengths[:, None]).flatten()[:tokens_q]


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v
