"""Block masks: for each query block, the list of key blocks that are computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockMask:
    """The lists of key blocks that query blocks attend to.

    A listed block is computed completely, except for its padding: block ``j`` holds ``lengths_k[..., j]`` real keys,
    which come first. Full blocks are listed before ragged ones, and each part is ascending, so that a kernel can run
    the full ones without masks. Entries of ``indices`` past the count are undefined. So is the row of a query block
    that lists every key block: its list is ``every``, so that a few such rows, as for text, do not make all lists
    long.

    Args:
        indices: ``(B or 1, H or 1, Nq, max_count)`` int32.
        counts: ``(B or 1, H or 1, Nq)`` int32, key blocks listed in each row.
        full_counts: ``(B or 1, H or 1, Nq)`` int32, how many of them, the first ones, are full.
        every: ``(Nk,)`` int32, all key blocks, full ones first.
        lengths_q: ``(B or 1, H or 1, Nq)`` int32, real queries in each query block, in [0, block_q].
        lengths_k: ``(B or 1, H or 1, Nk)`` int32, real keys in each key block, in [0, block_k].
        block_q: Queries in a block.
        block_k: Keys in a block.
        derived: Data that kernels derive from the lists and cache here, by kernel.
    """

    indices: Tensor
    counts: Tensor
    full_counts: Tensor
    every: Tensor
    lengths_q: Tensor
    lengths_k: Tensor
    block_q: int
    block_k: int
    derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_dense(
        cls,
        blocks: Tensor,
        *,
        block_q: int,
        block_k: int,
        tokens_q: int | None = None,
        tokens_k: int | None = None,
        lengths_q: Tensor | None = None,
        lengths_k: Tensor | None = None,
        max_count: int | None = None,
    ) -> BlockMask:
        """Build the lists from a map of blocks.

        A query block without any key block gets the one at its own relative position (see ``keep_some``), so that
        every query attends to something.

        Args:
            blocks: ``(Nq, Nk)`` or ``(B or 1, H or 1, Nq, Nk)`` bool, True where a block is computed.
            block_q: Queries in a block, at least 1.
            block_k: Keys in a block, at least 1.
            tokens_q: Queries in all, when only the last block may be ragged; default: all blocks are full.
            tokens_k: Keys in all, likewise.
            lengths_q: ``(Nq,)`` or ``(B or 1, H or 1, Nq)`` real queries per block, instead of ``tokens_q``.
            lengths_k: ``(Nk,)`` or ``(B or 1, H or 1, Nk)`` real keys per block, instead of ``tokens_k``.
            max_count: An upper bound of the blocks in a row that does not list every block. It and the lengths are
                trusted, to avoid a synchronisation with the GPU. Without it, the longest such row is determined and
                lengths are checked.

        Raises:
            ValueError: A shape, token count or length does not fit the block map.
            TypeError: ``blocks`` is not bool.
        """
        if blocks.dtype != torch.bool:
            raise TypeError(f"blocks must be bool, got {blocks.dtype}; compare scores with a threshold first")
        if blocks.ndim == 2:
            blocks = blocks[None, None]
        if blocks.ndim != 4 or 0 in blocks.shape:
            raise ValueError(
                f"blocks must be (Nq, Nk) or (B or 1, H or 1, Nq, Nk) and not empty, got {tuple(blocks.shape)}"
            )
        if block_q < 1 or block_k < 1:
            raise ValueError(f"block sizes must be at least 1, got block_q={block_q}, block_k={block_k}")
        num_q, num_k = blocks.shape[-2:]
        shape, trusted = blocks.shape[:2], max_count is not None
        lengths_q = _lengths("q", (*shape, num_q), block_q, tokens_q, lengths_q, blocks.device, trusted=trusted)
        lengths_k = _lengths("k", (*shape, num_k), block_k, tokens_k, lengths_k, blocks.device, trusted=trusted)
        return cls._from_rows(keep_some(blocks), lengths_q, lengths_k, block_q, block_k, max_count)

    @classmethod
    def _from_rows(
        cls,
        blocks: Tensor,
        lengths_q: Tensor,
        lengths_k: Tensor,
        block_q: int,
        block_k: int,
        max_count: int | None,
    ) -> BlockMask:
        num_k = blocks.shape[-1]
        ragged, rank, every = listing_order(lengths_k, block_k)
        counts = blocks.sum(-1, dtype=torch.int32)
        full_counts = (blocks & ~ragged).sum(-1, dtype=torch.int32)
        longest = int(torch.where(counts < num_k, counts, 0).max()) if max_count is None else min(max_count, num_k)
        order = torch.where(blocks, rank, 2 * num_k).sort(-1).values[..., : max(1, longest)]
        return cls((order % num_k).contiguous(), counts, full_counts, every, lengths_q, lengths_k, block_q, block_k)

    @property
    def num_q(self) -> int:
        """Count the query blocks."""
        return self.indices.shape[2]

    @property
    def num_k(self) -> int:
        """Count the key blocks."""
        return self.lengths_k.shape[-1]

    @property
    def device(self) -> torch.device:
        """Return the device of the lists."""
        return self.indices.device

    @property
    def ragged_blocks(self) -> Tensor:
        """Return ``(Nk,)`` bool, True for key blocks that hold padding in any sample or head."""
        return listing_order(self.lengths_k, self.block_k)[0]

    @cached_property
    def kept(self) -> Tensor:
        """Return the fraction of real (query, key) pairs that is computed, as a 0-d fp32 tensor in [0, 1]."""
        return self.kept_by_head.mean().float()

    @cached_property
    def kept_by_head(self) -> Tensor:
        """Return the fraction of real (query, key) pairs each head computes: ``(B or 1, H or 1)`` fp64 in [0, 1]."""
        first = torch.arange(self.lengths_k[..., 0].numel(), dtype=torch.int32, device=self.device) * self.num_k
        index = self.indices + first.view(*self.lengths_k.shape[:2], 1, 1)
        # gather would need int64 entries, which take gigabytes for a large model
        keys = self.lengths_k.flatten().index_select(0, index.flatten()).view(index.shape)
        keys = keys.masked_fill_(~listed_entries(self.counts, index.shape[-1]), 0).sum(-1)
        keys = torch.where(self.counts == self.num_k, self.lengths_k.sum(-1, keepdim=True), keys)
        total = self.lengths_q.sum(-1) * self.lengths_k.sum(-1)
        return (keys * self.lengths_q).sum(-1).double() / total.clamp(min=1)

    @property
    def density(self) -> float:
        """Return the fraction of real (query, key) pairs that is computed, in [0, 1]; padding does not count."""
        return float(self.kept)

    def to_dense(self) -> Tensor:
        """Return the block map, ``(B or 1, H or 1, Nq, Nk)`` bool."""
        listed = listed_entries(self.counts, self.indices.shape[-1])
        blocks = torch.zeros(*self.indices.shape[:3], self.num_k + 1, dtype=torch.bool, device=self.device)
        index = torch.where(listed, self.indices.long(), self.num_k)
        blocks.scatter_(3, index, True)
        return blocks[..., : self.num_k] | (self.counts == self.num_k)[..., None]

    def lists(self) -> tuple[Tensor, Tensor]:
        """Return the lists with every row written out.

        Returns:
            Key blocks, ``(B or 1, H or 1, Nq, n)`` int64, and which of them are listed, bool of the same shape.
        """
        indices = self.indices
        if int(self.counts.max()) > indices.shape[-1]:
            stored = torch.nn.functional.pad(indices, (0, self.num_k - indices.shape[-1]))
            indices = torch.where((self.counts == self.num_k)[..., None], self.every, stored)
        listed = listed_entries(self.counts, indices.shape[-1])
        return torch.where(listed, indices, 0).long(), listed

    def to_tokens(self, tokens_q: int, tokens_k: int) -> Tensor:
        """Expand to single tokens: ``(B or 1, H or 1, tokens_q, tokens_k)`` bool.

        Padding keys are False everywhere; padding queries keep the row of their block.

        Args:
            tokens_q: Queries in the padded order, at most ``Nq * block_q``.
            tokens_k: Keys in the padded order, at most ``Nk * block_k``.
        """
        dense = self.to_dense()
        dense = dense.repeat_interleave(self.block_q, 2).repeat_interleave(self.block_k, 3)
        offsets = torch.arange(self.block_k, device=self.device)
        real = (offsets < self.lengths_k[..., None]).flatten(2)
        return (dense & real[:, :, None])[..., :tokens_q, :tokens_k]

    def with_lengths_k(self, lengths_k: Tensor) -> BlockMask:
        """Return the same block map over shorter key blocks, as for padded text.

        Args:
            lengths_k: ``(Nk,)`` or ``(B or 1, H or 1, Nk)`` real keys in each block, in [0, block_k].

        Raises:
            ValueError: A shape or length does not fit the block map.
        """
        shape = (*self.indices.shape[:2], self.num_k)
        return self.shortened(self.lengths_q, _lengths("k", shape, self.block_k, None, lengths_k, self.device))

    def shortened(self, lengths_q: Tensor, lengths_k: Tensor) -> BlockMask:
        """Return the same block map over shorter blocks. Lengths are not checked, to avoid a synchronisation.

        Args:
            lengths_q: ``(B or 1, H or 1, Nq)`` int32 real queries in each block, in [0, block_q].
            lengths_k: ``(B or 1, H or 1, Nk)`` int32 real keys in each block, in [0, block_k].
        """
        ragged, rank, every = listing_order(lengths_k, self.block_k)
        listed = listed_entries(self.counts, self.indices.shape[-1])
        # sort the lists themselves, to avoid a map of all pairs
        order = torch.where(listed, rank[self.indices], 2 * self.num_k).sort(-1).values
        full_counts = (order < self.num_k).sum(-1, dtype=torch.int32)
        full_counts = torch.where(self.counts == self.num_k, (~ragged).sum(dtype=torch.int32), full_counts)
        lists = {"indices": order % self.num_k, "full_counts": full_counts, "every": every}
        return replace(self, **lists, lengths_q=lengths_q, lengths_k=lengths_k)

    def to(self, device: torch.device | str) -> BlockMask:
        """Return the mask on another device.

        Args:
            device: Device of the new mask.
        """
        names = ("indices", "counts", "full_counts", "every", "lengths_q", "lengths_k")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def __repr__(self) -> str:
        return (
            f"BlockMask({self.num_q}x{self.num_k} blocks of {self.block_q}x{self.block_k}, "
            f"batch {self.indices.shape[0]}, heads {self.indices.shape[1]}, density {self.density:.3f})"
        )


def keep_some(blocks: Tensor) -> Tensor:
    """Add, to each query block without any key block, the one at its own relative position.

    Args:
        blocks: ``(..., Nq, Nk)`` bool.

    Returns:
        ``(..., Nq, Nk)`` bool; no row is empty.
    """
    num_q, num_k = blocks.shape[-2:]
    own = torch.arange(num_q, device=blocks.device) * num_k // num_q
    own = own[:, None].expand(*blocks.shape[:-1], 1)
    empty = ~blocks.any(-1, keepdim=True)
    return blocks.scatter(-1, own, blocks.gather(-1, own) | empty)


def listing_order(lengths_k: Tensor, block_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the listing order of key blocks: full ones first, each part ascending.

    Args:
        lengths_k: ``(B or 1, H or 1, Nk)`` int32 real keys in each key block.
        block_k: Keys in a block, at least 1.

    Returns:
        Which blocks are ragged in any sample or head, ``(Nk,)`` bool; numbers that sort them as they are listed and
        are their own modulo Nk, ``(Nk,)`` int32; and all of them as they are listed, ``(Nk,)`` int32.
    """
    num_k = lengths_k.shape[-1]
    ragged = (lengths_k < block_k).flatten(0, 1).any(0)
    rank = torch.arange(num_k, device=lengths_k.device, dtype=torch.int32) + ragged.int() * num_k
    return ragged, rank, rank.sort().values % num_k


def listed_entries(counts: Tensor, width: int) -> Tensor:
    """Mark the valid entries of lists: ``(B or 1, H or 1, Nq, width)`` bool.

    Args:
        counts: ``(B or 1, H or 1, Nq)`` int32, blocks listed in each row.
        width: Entries of a list, at least 1.
    """
    return torch.arange(width, device=counts.device) < counts[..., None]


def _lengths(
    side: str,
    shape: tuple[int, ...],
    block: int,
    tokens: int | None,
    lengths: Tensor | None,
    device: torch.device,
    *,
    trusted: bool = False,
) -> Tensor:
    num = shape[-1]
    if lengths is not None:
        if tokens is not None:
            raise ValueError(f"give tokens_{side} or lengths_{side}, not both")
        given = lengths[None, None] if lengths.ndim == 1 else lengths
        alike = given.ndim == 3 and all(n == m or 1 in (n, m) for n, m in zip(given.shape[:2], shape[:2], strict=True))
        if not alike or given.shape[2] != num:
            raise ValueError(
                f"lengths_{side} must be (N,) or (B or 1, H or 1, N) with N = {num} blocks, for a map of batch "
                f"{shape[0]} and {shape[1]} heads, got {tuple(lengths.shape)}"
            )
        whole = given.to(device=device, dtype=torch.int32)
        if not trusted:
            wrong = given[(given < 0) | (given > block) | (given != whole.to(given.device))]
            if len(wrong):
                raise ValueError(
                    f"lengths_{side} must be whole numbers in [0, {block}], the tokens of a block, "
                    f"got {wrong[0].item()}"
                )
        return whole
    tokens = num * block if tokens is None else tokens
    if not (num - 1) * block < tokens <= num * block:
        raise ValueError(
            f"tokens_{side}={tokens} does not fit {num} blocks of {block}: "
            f"it must be in [{(num - 1) * block + 1}, {num * block}]"
        )
    starts = torch.arange(num, device=device, dtype=torch.int32) * block
    return (tokens - starts).clamp(max=block).view(1, 1, -1)
