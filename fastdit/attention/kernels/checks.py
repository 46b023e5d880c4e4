"""Validation of the block lists that kernels rely on, on their device."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ...mask import BlockMask

SWITCH = "FASTDIT_CHECK_LISTS"
"""The environment variable that, set to 1, has the lists of every call checked, which waits for the device."""


def lists_are_checked() -> bool:
    """Return whether the lists of every call are to be checked."""
    return os.environ.get(SWITCH) == "1"


def check_lists(mask: BlockMask) -> None:
    """Check that no kernel would read past a list, or a block twice.

    Args:
        mask: The blocks, of any device.

    Raises:
        ValueError: A length is more than a block, a row counts more than it lists, or lists a block that is not there,
            not in its order, or as full though it holds padding.
    """
    for name, lengths, block in (("q", mask.lengths_q, mask.block_q), ("k", mask.lengths_k, mask.block_k)):
        wrong = lengths[(lengths < 0) | (lengths > block)]
        if len(wrong):
            raise ValueError(f"mask.lengths_{name} must be in [0, {block}], the tokens of a block, got {int(wrong[0])}")
    num_k, stored = mask.num_k, mask.indices.shape[-1]
    counts, full = mask.counts, mask.full_counts
    whole = counts == num_k
    place = torch.arange(stored, device=mask.device)
    listed = (place < counts[..., None]) & ~whole[..., None]
    indices = torch.where(listed, mask.indices.long(), 0)
    outside = (indices < 0) | (indices >= num_k)
    falling = torch.zeros_like(listed)
    falling[..., 1:] = listed[..., 1:] & (indices[..., 1:] <= indices[..., :-1]) & (place[1:] != full[..., None])
    padded = mask.ragged_blocks[indices.clamp(0, num_k - 1)] & listed & (place < full[..., None])
    for wrong, text in (
        ((counts < 0) | (counts > num_k), f"counts are not in [0, {num_k}], the number of key blocks"),
        ((full < 0) | (full > counts), "full_counts are not in [0, count]"),
        ((counts > stored) & ~whole, f"counts are beyond the {stored} entries of a list"),
        (outside.any(-1), f"key blocks are not in [0, {num_k})"),
        (falling.any(-1), "key blocks do not ascend, the full ones and the ragged ones each by themselves"),
        (padded.any(-1), "key blocks that hold padding are among the full ones"),
    ):
        _refuse(wrong, text, mask)
    if not torch.equal(mask.every.long().sort().values, torch.arange(num_k, device=mask.device)):
        raise ValueError(f"mask.every must hold each of the {num_k} key blocks once, got {mask.every.tolist()}")


def check_index(index: Tensor, mask: BlockMask, tokens: int) -> None:
    """Check that no kernel would read past the tokens.

    Args:
        index: ``(1 or H, n)`` int64, the token at each position of the mask's sequence, -1 for padding.
        mask: The blocks, of any device.
        tokens: Tokens that there are, at least 1.

    Raises:
        ValueError: A number is no token and not -1, or there is padding among the real tokens of a block.
    """
    outside = (index < -1) | (index >= tokens)
    if bool(outside.any()):
        raise ValueError(f"index must be in [-1, {tokens}), got {int(index[outside][0])}; see TokenLayout.index")
    for block, lengths in ((mask.block_q, mask.lengths_q), (mask.block_k, mask.lengths_k)):
        real = (torch.arange(block, device=mask.device) < lengths[..., None]).flatten(2)[..., : index.shape[1]]
        if bool((real & (index < 0)).any()):
            raise ValueError(
                "index is -1 where the mask's lengths count real tokens; in a block they come first, and padding last"
            )


def _refuse(wrong: Tensor, text: str, mask: BlockMask) -> None:
    if not bool(wrong.any()):
        return
    batch, head, row = wrong.nonzero()[0].tolist()
    count, full = int(mask.counts[batch, head, row]), int(mask.full_counts[batch, head, row])
    raise ValueError(
        f"the mask's {text} in {int(wrong.sum())} rows; the first is batch {batch}, head {head}, row {row}: count "
        f"{count}, {full} of it full, list {mask.indices[batch, head, row, : max(0, count)].tolist()}; "
        "BlockMask.from_dense makes lists that fit"
    )
