"""Block selection shared by methods, in fp32: pooling, scores, and rules that keep blocks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import TokenLayout
from ..mask import keep_some
from ..tokens import TokenSpec
from .kernels.means import means_of_blocks

SCORES_AT_ONCE = 1 << 24


def pool_blocks(x: Tensor, block: int, lengths: Tensor) -> Tensor:
    """Average the real tokens of each block.

    Arguments as for ``means_of_blocks``.

    Returns:
        ``(B, H, N, D)`` fp32; 0 for a block without tokens.

    Raises:
        ValueError: The blocks do not fit the sequence.
    """
    if not 0 <= lengths.shape[-1] * block - x.shape[2] < block:
        raise ValueError(
            f"{lengths.shape[-1]} blocks of {block} do not fit a sequence of {x.shape[2]} positions; "
            "give the lengths of the layout that it was put into"
        )
    return means_of_blocks(x, block, lengths)


def sample_tokens(lengths: Tensor, block: int, samples: int, *, heads: int, seed: int = 0) -> Tensor:
    """Draw tokens of each block at random: per head the same places in every block, as far as the block has them.

    The draw depends on nothing but the arguments: it is the same on every device and for every sample of a batch.

    Args:
        lengths: ``(N,)``, ``(1 or H, N)`` or ``(B or 1, H or 1, N)`` real tokens of each block, the first ones in it.
        block: Tokens per block, at least 1.
        samples: Tokens to draw from a block, at least 1; all of a block that has fewer.
        heads: Heads to draw for, at least 1.
        seed: Random seed.

    Returns:
        ``(B or 1, H, N, min(samples, block))`` int64 positions in the laid out sequence, -1 after the last one.

    Source: Video-BLADE (arXiv 2508.10774), adaptive sparse attention; its code also draws padding.
    """
    generator = torch.Generator().manual_seed(seed)
    turn = torch.rand(heads, 1, block, generator=generator, dtype=torch.float32, device="cpu").to(lengths.device)
    inside = torch.arange(block, device=lengths.device) < lengths[..., None]
    turn = turn.expand(inside.shape[0] if inside.ndim == 4 else 1, heads, inside.shape[-2], block)
    turn, place = turn.masked_fill(~inside, torch.inf).sort(dim=-1, stable=True)
    starts = torch.arange(place.shape[2], device=lengths.device)[:, None] * block
    return torch.where(turn < torch.inf, place + starts, -1)[..., :samples]


def sampled_scores(q: Tensor, k: Tensor, tokens: Tensor, lengths: Tensor, *, scale: float) -> Tensor:
    """Estimate how much attention each query block pays to each key block, from a few tokens of each.

    Drawn keys stand for all keys of their block, so that short blocks do not count for more than they hold.

    Args:
        q: ``(B, H, S_padded, D)`` laid out queries, any float dtype.
        k: ``(B, H, S_padded, D)`` laid out keys, likewise.
        tokens: ``(B or 1, H, N, n)`` int64 positions drawn from each block, -1 for none, as of ``sample_tokens``.
        lengths: ``(N,)``, ``(1 or H, N)`` or ``(B or 1, H or 1, N)`` real tokens of each block.
        scale: Softmax scale.

    Returns:
        ``(B, H, N, N)`` fp32 in [0, 1], every row with a token adds up to 1.

    Source: Video-BLADE (arXiv 2508.10774), adaptive sparse attention.
    """
    batch, heads, _, dim = q.shape
    index = tokens.clamp(min=0).flatten(2)[..., None].expand(batch, heads, -1, dim)
    real = tokens >= 0
    sizes = (lengths[..., None].float() / real.sum(-1, keepdim=True).clamp(min=1)).where(real, 0)
    return mass_of_points(q.gather(2, index), k.gather(2, index), sizes, scale=scale)


def mass_of_points(q: Tensor, k: Tensor, sizes: Tensor, *, scale: float) -> Tensor:
    """Sum over blocks the attention map of a few points that stand for the tokens of each block.

    Args:
        q: ``(B, H, N * n, D)`` queries, those of a block beside each other, any float dtype; those that stand for
            nothing must be finite.
        k: ``(B, H, N * n, D)`` keys, likewise.
        sizes: ``(B or 1, H or 1, N, n)`` how many tokens each stands for, at least 0.
        scale: Softmax scale.

    Returns:
        ``(B, H, N, N)`` fp32 in [0, 1], every row with a token adds up to 1.
    """
    batch, heads = q.shape[:2]
    blocks, points = sizes.shape[2:]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, sizes = q.to(dtype) * scale, k.to(dtype), sizes.to(dtype)
    shares = sizes / sizes.sum(-1, keepdim=True).clamp(min=1e-9)
    out = q.new_empty(batch, heads, blocks, blocks)
    rows = max(1, SCORES_AT_ONCE // (batch * heads * blocks * points**2))
    for start in range(0, blocks, rows):
        logits = q[:, :, start * points : (start + rows) * points] @ k.mT + sizes.log().flatten(2)[:, :, None]
        mass = logits.softmax(-1).unflatten(-1, (blocks, points)).sum(-1).unflatten(2, (-1, points))
        out[:, :, start : start + rows] = (mass * shares[:, :, start : start + rows, :, None]).sum(3)
    return out


def by_heads(choose: Callable[[slice], Tensor], heads: int, scores: int) -> Tensor:
    """Choose blocks for a few heads at a time, so that the scores of all heads never exist at once.

    Args:
        choose: Chooses for the heads in a slice: ``(B, h, Nq, Nk)`` bool.
        heads: Heads in all, at least 1.
        scores: Scores that one head takes in all samples, ``B * Nq * Nk``. At most 2^24 are held at a time, or those of
            one head.

    Returns:
        ``(B, heads, Nq, Nk)`` bool.
    """
    group = max(1, SCORES_AT_ONCE // scores)
    if group >= heads:
        return choose(slice(0, heads))
    out = None
    for first in range(0, heads, group):
        part = choose(slice(first, min(first + group, heads)))
        out = part.new_empty(part.shape[0], heads, *part.shape[2:]) if out is None else out
        out[:, first : first + group] = part
    assert out is not None
    return out


def top_count(density: float, total: int) -> int:
    """Return how many of ``total`` a density keeps: the nearest whole number, at least 1.

    Args:
        density: In [0, 1].
        total: What there is, at least 1.
    """
    return min(max(1, math.floor(density * total + 0.5)), total)


def keep_top_k(scores: Tensor, count: int) -> Tensor:
    """Keep the same number of scores in every row, the largest ones; of equal scores, those with the lower index.

    Args:
        scores: ``(..., N)``, any float dtype.
        count: How many to keep, in [1, N]; see ``top_count``.

    Returns:
        ``(..., N)`` bool.

    Raises:
        ValueError: ``count`` is outside [1, N].
    """
    if not 1 <= count <= scores.shape[-1]:
        raise ValueError(f"count must be in [1, {scores.shape[-1]}], got {count}; top_count turns a density into one")
    threshold = scores.topk(count, sorted=False).values.amin(-1, keepdim=True)
    above, tied = scores > threshold, scores == threshold
    room = count - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))


def keep_top_p(scores: Tensor, mass: float, *, min_density: float = 0.0, max_density: float = 1.0) -> Tensor:
    """Keep, in every row, the fewest scores that hold a share of the row's sum, within bounds on their number.

    The score that crosses the share is kept. Of equal scores, those with the lower index are kept first.

    Args:
        scores: ``(..., N)`` of at least 0, any float dtype, such as softmax weights.
        mass: Share to reach, in (0, 1]; 1 keeps all scores but zeros.
        min_density: Fraction of a row that is kept in any case, in [0, 1]; at least one score is.
        max_density: Fraction of a row that is kept at most, in [min_density, 1]; at least one score.

    Returns:
        ``(..., N)`` bool.

    Source: Video-BLADE (arXiv 2508.10774), adaptive sparse attention; its code drops the score that crosses.
    """
    total = scores.shape[-1]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    # Summed from the smallest: the mass lost by stopping before each score, exact for small losses.
    lost = values.flip(-1).cumsum(-1).flip(-1)
    place = torch.arange(total, device=scores.device)
    kept = (lost > (1 - mass) * lost[..., :1]) | (place < top_count(min_density, total))
    kept &= place < top_count(max_density, total)
    return torch.empty_like(kept).scatter_(-1, order, kept)


def keep_top_fraction(scores: Tensor, density: float) -> Tensor:
    """Keep the largest scores of each map as a whole, so that rows may keep different numbers.

    Of equal scores, those with the lower index are kept, row by row.

    Args:
        scores: ``(..., Nq, Nk)``, any float dtype.
        density: Fraction of each ``Nq * Nk`` map to keep, in (0, 1].

    Returns:
        ``(..., Nq, Nk)`` bool.

    Source: DraftAttention (arXiv 2505.14708), whose count of those left out is rounded down.
    """
    flat = scores.flatten(-2)
    dropped = min(math.floor((1 - density) * flat.shape[-1] + 1e-6), flat.shape[-1] - 1)
    return keep_top_k(flat, flat.shape[-1] - dropped).view(scores.shape)


def keep_own(blocks: Tensor) -> Tensor:
    """Add, for each query block, the key block at its own relative position.

    Args:
        blocks: ``(..., Nq, Nk)`` bool.

    Returns:
        ``(..., Nq, Nk)`` bool.
    """
    num_q, num_k = blocks.shape[-2:]
    own = torch.arange(num_q, device=blocks.device) * num_k // num_q
    return blocks | (own[:, None] == torch.arange(num_k, device=blocks.device))


def keep_first_frame(blocks: Tensor, layout: TokenLayout, tokens: TokenSpec) -> Tensor:
    """Add the key blocks that hold a token of the first frame, to which much attention goes.

    Args:
        blocks: ``(B or 1, H or 1, M, M)`` bool, the video part, in blocks of the layout.
        layout: The order.
        tokens: The token spec of the sequence.

    Returns:
        ``(B or 1, H or 1, M, M)`` bool.
    """
    video = layout.index[:, : layout.video_blocks * layout.block] - tokens.video.start
    first = (video >= 0) & (video < tokens.grid.frame_tokens)
    first = F.pad(first, (0, -first.shape[-1] % layout.block)).unflatten(-1, (-1, layout.block)).any(-1)
    return blocks | first[:, None]


def keep_text(video_blocks: Tensor, num_q: int, num_k: int) -> Tensor:
    """Extend a block map of the video by text blocks, which attend to all and are attended to by all.

    Video that attends to no video gets the block at its own relative position: text alone, which may be padding, is
    not enough.

    Args:
        video_blocks: ``(..., Mq, Mk)`` bool, the video part.
        num_q: Query blocks in all, at least ``Mq``.
        num_k: Key blocks in all, at least ``Mk``.

    Returns:
        ``(..., num_q, num_k)`` bool.
    """
    rows, columns = video_blocks.shape[-2:]
    return F.pad(keep_some(video_blocks), (0, num_k - columns, 0, num_q - rows), value=True)
