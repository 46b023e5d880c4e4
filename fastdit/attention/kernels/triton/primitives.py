"""Device functions that several Triton kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import Config

MEANS_TILE = 32  # means that the forward kernel reads at a time: with more, fp32 spills


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    # The interpreter multiplies the raw bits of bf16; widening costs nothing on a GPU, where it is off.
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _load(tile, dims, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    if HEAD_DIM == PADDED_DIM:
        return tl.load(tile)
    else:
        return tl.load(tile, mask=(dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _add_some(scores, v, acc, total, top, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    # Scores may be -inf. While a row has seen no key its maximum is -inf, and -inf minus -inf is NaN.
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = _dot(weights.to(v.dtype), v, acc * shrink[:, None], WIDEN, PRECISION)
    return acc, total, new_top


@triton.jit
def _read(head_ptr, block, rows, stride, dims, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    start = head_ptr + block.to(tl.int64) * BLOCK_K * stride
    return _load(start + (rows[:, None] * stride + dims[None, :]), dims, HEAD_DIM, PADDED_DIM)


@triton.jit
def _read_descriptor(descriptor, batch, head, start, TILE: tl.constexpr, PADDED_DIM: tl.constexpr):
    # What lies past the head dim is read as zeros.
    return descriptor.load([batch, head, start, 0]).reshape(TILE, PADDED_DIM)


@triton.jit
def _add_all(q, k, v, acc, total, top, scale, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    scores = _dot(q, tl.trans(k), None, WIDEN, PRECISION)
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    acc = _dot(weights.to(v.dtype), v, acc * shrink[:, None], WIDEN, PRECISION)
    return acc, total, new_top


@triton.jit
def count_ragged(list_ptr, length_ptr, first, last, TILE: tl.constexpr):
    # Tiles past the last key of a block would add nothing, so they are not counted; a block without keys has one.
    tiles = 0
    for start in tl.range(first, last, 128):
        at = start + tl.arange(0, 128)
        blocks = tl.load(list_ptr + at, mask=at < last, other=0)
        lengths = tl.maximum(tl.load(length_ptr + blocks, mask=at < last, other=0), 1)
        tiles += tl.sum(tl.where(at < last, tl.cdiv(lengths, TILE), 0), 0)
    return tiles


@triton.jit
def next_ragged(place, length, SPLIT: tl.constexpr, TILE: tl.constexpr):
    # The next tile of the same block, or the first one of the next in the list.
    return tl.where((place % SPLIT + 1) * TILE < length, place + 1, (place // SPLIT + 1) * SPLIT)


@triton.jit
def _attend_means(
    q, acc, total, top, k_head, v_head, dropped_row, length_head, start, num_k, scale, dims,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = start + tl.arange(0, TILE)
    inside = blocks < num_k
    dropped = tl.load(dropped_row + blocks, mask=inside, other=0) != 0
    sizes = tl.maximum(tl.load(length_head + blocks, mask=inside, other=1), 1).to(tl.float32)
    # Past the last block there are zeros, so that means are loaded without masks.
    k = _load(k_head + (blocks[:, None] * HEAD_DIM + dims[None, :]), dims, HEAD_DIM, PADDED_DIM)
    v = _load(v_head + (blocks[:, None] * HEAD_DIM + dims[None, :]), dims, HEAD_DIM, PADDED_DIM)
    # A key that counts n times has log(n) added to its score.
    bias = tl.where(dropped, tl.log2(sizes), float("-inf"))
    scores = _dot(q, tl.trans(k), None, WIDEN, PRECISION) * scale + bias[None, :]
    return _add_some(scores, v, acc, total, top, WIDEN, PRECISION)


def compile_options(config: Config) -> dict[str, int | bool]:
    """Return how the forward kernel is compiled.

    Args:
        config: The settings.
    """
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def broadcast_strides(x: Tensor) -> tuple[int, int]:
    """Return the strides of the batch and head axes, 0 where one entry serves all.

    Args:
        x: ``(B or 1, H or 1, ...)``.
    """
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0


@triton.jit
def of_queries(
    dq, q, grad, log_total, delta, k_tile, v_tile, bias, scale, dims,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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
    dk, dv, k, v, q_tile, grad_tile, log_total_row, delta_row, bias, scale, dims,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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

    Arguments as for ``constants``.
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
