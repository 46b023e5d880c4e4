"""Calibration of PARO plans from the queries and keys of a dense run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ....layout import TokenLayout
from ....schedule import check_edges, step_bucket
from ....token_orders import axis_order
from ....tokens import AttentionCall, TokenSpec
from ...mass import attention_rows, block_mass
from ...method import check_block_size, check_density
from .masks import AXIS_ORDERS, ParoPlan, pack

PASSES = 3
"""Runs that a calibration takes: to check the samples, to choose orders, to sum over blocks."""

Look = Callable[[Tensor, Tensor, AttentionCall], object]
Run = Callable[[Look], object]


class NoSamples(ValueError):
    """A calibration run without samples."""


@torch.no_grad()
def calibrate(
    run: Run,
    *,
    density: float = 0.5,
    block_size: int = 64,
    edges: Sequence[float] = (1.0,),
    small: float = 1e-3,
    small_share: float = 0.9,
    balance: float = 0.5,
    device: torch.device | str | None = None,
) -> ParoPlan:
    """Choose an axis order and the blocks to compute for every layer and head, from exact attention maps.

    A sample is what one self-attention call of a dense run was given. One or two prompts are enough: what is found
    differs little between prompts. The order of a head holds for all steps. Blocks are chosen for each bucket of
    steps: those with the largest sums of the attention map in that order, until the density is met. Each block's own
    comes before all others. Text is always computed, and counts in the density.

    The run is repeated: to check the samples, to choose orders, to sum over blocks. No sample is kept. Attention maps
    are computed a few rows at a time; the sums of all layers and heads are held together, 4 bytes for each pair of
    blocks.

    Args:
        run: Runs the model and calls the function it is given with each sample, ``(q, k, call)``: queries and keys
            ``(B, H, S, D)``, after normalisation and rotary embedding. Each time the samples are the same. Their calls
            agree in tokens and number of layers, and cover each layer in each bucket.
        density: Fraction of the (query, key) pairs to keep, in (0, 1]. The paper reports 0.5, 0.3 and 0.2.
        block_size: Tokens per block, a power of two in [16, 256].
        edges: Ends of the step buckets as fractions of the run, ascending, the last one 1; each has blocks of its own.
            The paper has a bucket for each step of the first half and one for the second half, so for 10 steps
            ``(0.1, 0.2, 0.3, 0.4, 0.5, 1)``.
        small: Entries of the attention map below it count as small, above 0; epsilon in the paper.
        small_share: Share of small entries from which on a block counts as sparse, in (0, 1]; sigma in the paper.
        balance: Weight of sparse blocks against even ones in the choice of an order, in [0, 1]; alpha in the paper.
        device: Where to compute; default: where the first sample is.

    Raises:
        ValueError: A number is out of range, the samples do not fit each other, or some are missing or not finite.

    Source: PAROAttention (arXiv 2506.16054), offline calibration.
    """
    check_density(density)
    check_block_size("block_size", block_size)
    check_edges(edges)
    if not small > 0 or not 0 < small_share <= 1 or not 0 <= balance <= 1:
        raise ValueError(
            "small must be above 0, small_share in (0, 1] and balance in [0, 1], "
            f"got {small}, {small_share} and {balance}"
        )
    tokens, counts, heads, default = _check(run, edges)
    device = torch.device(default if device is None else device)
    layouts = [
        TokenLayout.build(tokens, block=block_size, order=axis_order(tokens.grid, axes), device=device)
        for axes in AXIS_ORDERS
    ]
    sparse, uneven = torch.zeros(2, len(AXIS_ORDERS), len(counts), heads, dtype=torch.float64, device="cpu")

    def compare_orders(q: Tensor, k: Tensor, call: AttentionCall) -> None:
        for place, layout in enumerate(layouts):
            means = order_statistics(q.to(device), k.to(device), call, layout, small=small, small_share=small_share)
            sparse[place, call.layer] += means[0].cpu() / counts[call.layer]
            uneven[place, call.layer] += means[1].cpu() / counts[call.layer]

    run(compare_orders)
    scores = order_scores(sparse, uneven, balance)
    chosen = (scores <= scores.amin(0) * (1 + 1e-5)).int().argmax(0)  # the first of those equal up to rounding

    lengths = layouts[0].block_lengths[0, : layouts[0].video_blocks].long().cpu()
    shape = (len(edges), *chosen.shape, len(lengths), len(lengths))
    sums = torch.zeros(shape, dtype=torch.float32, device="cpu")

    def add_mass(q: Tensor, k: Tensor, call: AttentionCall) -> None:
        into = sums[step_bucket(edges, call.step, call.num_steps), call.layer]
        for place in chosen[call.layer].unique().tolist():
            head = (chosen[call.layer] == place).nonzero().flatten()
            mass = block_mass(**_of_video(q[:, head].to(device), k[:, head].to(device), call, layouts[place]))
            into[head] += mass[..., : len(lengths)].sum(0).float().cpu()

    run(add_mass)
    if not sums.isfinite().all():
        raise ValueError("queries or keys of the samples are NaN or Inf; capture them anew, or in a wider dtype")
    pairs = lengths[:, None] * lengths
    budget = density * tokens.num_tokens**2 - (tokens.num_tokens**2 - int(pairs.sum()))
    bits = [[pack(keep_largest(heads_of, pairs, budget)) for heads_of in layers] for layers in sums]
    return ParoPlan(
        tokens=tokens,
        block_size=block_size,
        density=density,
        orders=[[AXIS_ORDERS[place] for place in layer] for layer in chosen.tolist()],
        edges=edges,
        bits=torch.stack([torch.stack(layers) for layers in bits]),
    )


def order_statistics(
    q: Tensor, k: Tensor, call: AttentionCall, layout: TokenLayout, *, small: float, small_share: float
) -> tuple[Tensor, Tensor]:
    """Measure how well an order suits each head: means over the blocks of the video part of the exact attention map.

    Args:
        q: ``(B, H, S, D)`` queries.
        k: ``(B, H, S, D)`` keys.
        call: The call.
        layout: The order.
        small: Entries below it count as small, above 0.
        small_share: Share of small entries from which on a block counts as sparse, in (0, 1].

    Returns:
        The fraction of blocks that are sparse, in [0, 1], and the mean of a block's largest entry over its mean
        entry, at least 1: how badly one scale quantises it. Both ``(H,)`` fp64, means over the samples of the batch.
    """
    video, block = layout.video_blocks, layout.block
    lengths = layout.block_lengths[0, :video].long()
    sparse, uneven = torch.zeros(2, q.shape[1], dtype=torch.float64, device=q.device)
    for (_, head, rows), weights in attention_rows(**_of_video(q, k, call, layout)):
        pairs = lengths[rows, None] * lengths
        entries = weights[:, :, :video]
        padding = block * block - pairs  # whose entries are 0
        smalls = (entries < small).sum((1, 3)) - padding
        sparse[head] += (smalls.double() / pairs >= small_share).sum()
        mean = entries.sum((1, 3)).double() / pairs
        uneven[head] += torch.where(mean > 0, entries.amax((1, 3)) / mean, 1).sum()
    return sparse / (q.shape[0] * video**2), uneven / (q.shape[0] * video**2)


def order_scores(sparse: Tensor, uneven: Tensor, balance: float) -> Tensor:
    """Score orders; the least score is the best.

    Each term is an order's share of the sum over all orders. As printed, the paper adds the share of sparse blocks and
    takes the least score, which would prefer the order with the fewest of them; here blocks that are not sparse count.

    Args:
        sparse: ``(orders, ...)`` fraction of blocks that are sparse, in [0, 1].
        uneven: ``(orders, ...)`` mean of the largest over the mean entry, at least 1.
        balance: Weight of the first term, in [0, 1].

    Returns:
        ``(orders, ...)``, in [0, 1].

    Source: PAROAttention (arXiv 2506.16054), choice of the order.
    """
    dense = 1 - sparse
    # if all blocks of all orders are sparse, the first term is 0 for all
    share = dense / dense.sum(0).clamp(min=torch.finfo(dense.dtype).tiny)
    return balance * share + (1 - balance) * uneven / uneven.sum(0)


def keep_largest(sums: Tensor, pairs: Tensor, budget: float) -> Tensor:
    """Keep each block's own and then the blocks with the largest sums, until they hold enough pairs.

    Of equal sums the one further up, then further left, goes first. The block that reaches the budget is kept.

    Args:
        sums: ``(H, N, N)`` sums of the attention map.
        pairs: ``(N, N)`` int64, real (query, key) pairs of each block.
        budget: Pairs to reach; blocks of their own are kept even if it is 0 or less.

    Returns:
        ``(H, N, N)`` bool.
    """
    own = torch.eye(pairs.shape[0], dtype=torch.bool, device=sums.device)
    ranked = sums.masked_fill(own, torch.inf).flatten(1)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    held = pairs.flatten()[order]
    before = held.cumsum(-1) - held
    # an integer budget, because a fraction would round the counts to the default dtype
    kept = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, order, before < math.ceil(budget))
    return kept.view(sums.shape) | own


def _check(run: Run, edges: Sequence[float]) -> tuple[TokenSpec, list[int], int, torch.device]:
    """Return the tokens, how many samples each layer has, the number of heads, and the device of the first sample.

    Raises:
        NoSamples: There are none.
        ValueError: The samples do not fit each other, or some are missing.
    """
    seen: Counter[tuple[int, int]] = Counter()
    first: tuple[tuple[TokenSpec, int, int], torch.device] | None = None

    def check(q: Tensor, k: Tensor, call: AttentionCall) -> None:
        nonlocal first
        if q.ndim != 4 or q.shape != k.shape or q.shape[2] != call.tokens.num_tokens:
            raise ValueError(
                f"q and k must be (B, H, {call.tokens.num_tokens}, D), as the tokens of their call are, "
                f"got {tuple(q.shape)} and {tuple(k.shape)}"
            )
        this = (call.tokens, call.num_layers, q.shape[1])
        first = (this, q.device) if first is None else first
        if this != first[0]:
            raise ValueError(
                f"samples must agree in tokens, layers and heads, got {first[0]} and {this}; calibrate them apart"
            )
        seen[step_bucket(edges, call.step, call.num_steps), call.layer] += 1

    run(check)
    if first is None:
        raise NoSamples("there are no samples to calibrate with; give at least one for each layer")
    (tokens, layers, heads), device = first
    missing = [(bucket, layer) for bucket in range(len(edges)) for layer in range(layers) if not seen[bucket, layer]]
    if missing:
        raise ValueError(
            f"there is no sample of layer {missing[0][1]} of {layers} in step bucket {missing[0][0]} of {len(edges)} "
            f"({len(missing)} are missing in all); capture every layer at a step of each bucket, or use fewer buckets"
        )
    counts = [sum(seen[bucket, layer] for bucket in range(len(edges))) for layer in range(layers)]
    return tokens, counts, heads, device


def _of_video(q: Tensor, k: Tensor, call: AttentionCall, layout: TokenLayout) -> dict[str, Any]:
    """Return the arguments that give the attention map of the video queries over all keys."""
    video, lengths = layout.video_blocks, layout.block_lengths[None]
    real = lengths if call.key_padding is None else layout.lengths_without(call.key_padding.to(q.device))
    return {
        "q": layout.apply(q)[:, :, : video * layout.block],
        "k": layout.apply(k),
        "lse": None,
        "scale": q.shape[-1] ** -0.5 if call.scale is None else call.scale,
        "block": layout.block,
        "lengths_q": lengths[..., :video],
        "lengths_k": real,
    }
