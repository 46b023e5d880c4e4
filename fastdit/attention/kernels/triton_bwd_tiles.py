"""What the backward kernels do with one tile of queries and one of keys; ``triton_bwd.py`` has the formulas."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_config import Config
from .triton_fwd import _dot, _load
from .triton_means import MEANS_TILE


@triton.jit
def of_queries(
    dq,
    q,
    grad,
    log_total,
    delta,
    k_tile,
    v_tile,
    bias,
    scale,
    dims,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k = _load(k_tile, dims, HEAD_DIM, PADDED_DIM)
    v = _load(v_tile, dims, HEAD_DIM, PADDED_DIM)
    scores = _dot(q, tl.trans(k), None, WIDEN, PRECISION) * scale
    if bias is not None:
        scores += bias[None, :]
    weights = tl.exp2(scores - log_total[:, None])
    of_weights = _dot(grad, tl.trans(v), None, WIDEN, PRECISION)
    of_scores = weights * (of_weights - delta[:, None])
    return _dot(of_scores.to(k.dtype), k, dq, WIDEN, PRECISION)


@triton.jit
def of_keys(
    dk,
    dv,
    k,
    v,
    q_tile,
    grad_tile,
    log_total_row,
    delta_row,
    bias,
    scale,
    dims,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    q = _load(q_tile, dims, HEAD_DIM, PADDED_DIM)
    grad = _load(grad_tile, dims, HEAD_DIM, PADDED_DIM)
    scores = _dot(k, tl.trans(q), None, WIDEN, PRECISION) * scale
    if bias is not None:
        scores += bias[:, None]
    weights = tl.exp2(scores - tl.load(log_total_row)[None, :])
    dv = _dot(weights.to(grad.dtype), grad, dv, WIDEN, PRECISION)
    of_weights = _dot(v, tl.trans(grad), None, WIDEN, PRECISION)
    of_scores = weights * (of_weights - tl.load(delta_row)[None, :])
    dk = _dot(of_scores.to(q.dtype), q, dk, WIDEN, PRECISION)
    return dk, dv


@triton.jit
def bias_of_means(dropped_row, length_ptr, blocks, num_k):
    # A key that counts n times has log(n) added to its score.
    inside = blocks < num_k
    dropped = tl.load(dropped_row + blocks, mask=inside, other=0) != 0
    sizes = tl.maximum(tl.load(length_ptr + blocks, mask=inside, other=1), 1).to(tl.float32)
    return tl.where(dropped, tl.log2(sizes), float("-inf"))


def tile_constants(head_dim: int, dtype: torch.dtype, block_q: int, config: Config) -> dict[str, int | bool | str]:
    """Return the compile-time arguments that the backward kernels share, all that the one for means has.

    Args:
        head_dim: In [16, 128].
        dtype: Of q, k and v.
        block_q: Queries in a block of the mask.
        config: Tiles, of which ``tile_q`` divides ``block_q``.
    """
    return {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": triton.next_power_of_2(head_dim),
        "BLOCK_Q": block_q,
        "TILE_Q": config.tile_q,
        "TILE_K": config.tile_k,
        "MEANS_TILE": MEANS_TILE,
        "WIDEN": triton.knobs.runtime.interpret and dtype == torch.bfloat16,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }
