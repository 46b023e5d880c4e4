"""Linear attention of tokens whose states are known: the output, and gradients of queries, keys and values.

Without gradients the output of linear attention need not be seen: it is joined to that of another attention, the exact
part, where it is computed.

With features ``f`` of a query, the state ``H`` of its block and its sum of features ``z``, the output is
``o = w f H`` with ``w = 1 / (f z)``. A gradient ``g`` of it gives ``df = w (g H^T - (g o) z)``, and to the state of the
block ``(w f)^T g`` and ``-w (g o) f``. Added up over the query blocks that list a key block these are its ``G`` and
``y``, and there ``dv = f G`` and ``df = v G^T + y``. Source: SLA (arXiv 2509.24006), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..primitives import _dot
from .states import _features, _softmax_of, token_constants, token_options
from .tiles import SlaConfig


@triton.jit
def _add_times_state(
    a, state, acc, PARTS: tl.constexpr, STATE_PARTS: tl.constexpr, WIDTH: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    for i in tl.static_range(STATE_PARTS):
        b = tl.load(state + i * WIDTH)
        rest = a
        for _ in tl.static_range(min(PARTS, STATE_PARTS - i)):
            part = rest.to(tl.bfloat16)
            acc = _dot(part, b, acc, WIDEN, "tf32")
            if PARTS > 1:
                rest -= part.to(tl.float32)
    return acc


@triton.jit
def _load_sum(at, STATE_PARTS: tl.constexpr, WIDTH: tl.constexpr):
    x = tl.load(at).to(tl.float32)
    for i in tl.static_range(1, STATE_PARTS):
        x += tl.load(at + i * WIDTH).to(tl.float32)
    return x


@triton.jit
def _times_features(
    x_rows, present, top, share,
    state_ptr,
    dims,
    FEATURES: tl.constexpr, PADDED_FEATURES: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr, MAP: tl.constexpr, PARTS: tl.constexpr, STATE_PARTS: tl.constexpr, WIDTH: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    values = tl.zeros([TILE, PADDED_DIM], tl.float32)
    alone = tl.zeros([TILE], tl.float32)
    for first in tl.range(0, PADDED_FEATURES, CHUNK):
        features = first + tl.arange(0, CHUNK)
        _, f = _features(x_rows, present, top, share, features, FEATURES, MAP, PARTS)
        z = _load_sum(state_ptr + PADDED_FEATURES * PADDED_DIM + features, STATE_PARTS, WIDTH)
        alone += tl.sum(f * z[None, :], 1)
        state = state_ptr + (dims[None, :] * PADDED_FEATURES + features[:, None])
        values = _add_times_state(f, state, values, PARTS, STATE_PARTS, WIDTH, WIDEN)
    return values, alone


@triton.jit
def _project(x, weight_ptr, bias_ptr, dims, HEAD_DIM: tl.constexpr, WIDEN: tl.constexpr):
    inside = dims < HEAD_DIM
    weight = weight_ptr + (dims[None, :] * HEAD_DIM + dims[:, None])
    weight = tl.load(weight, mask=inside[None, :] & inside[:, None], other=0.0)
    bias = tl.load(bias_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    return _dot(x.to(weight.dtype), weight, None, WIDEN, "tf32x3") + bias[None, :]


@triton.jit
def _output_kernel(
    x_ptr, sums_ptr, out_ptr, exact_ptr, shares_ptr, weight_ptr, bias_ptr,
    stride_xh, stride_xs, stride_oh, stride_os, stride_exh, stride_exs, stride_sh,
    tokens, num_sums,
    FEATURES: tl.constexpr, PADDED_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, MAP: tl.constexpr, PARTS: tl.constexpr,
    STATE_PARTS: tl.constexpr, WIDTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, PADDED_DIM)
    present = rows < tokens
    block = tl.program_id(0) // (BLOCK // TILE)
    # One sum serves all blocks where the map lists all.
    state_ptr = sums_ptr + (head * num_sums + tl.minimum(block, num_sums - 1)) * (STATE_PARTS * WIDTH)
    x_rows = x_ptr + head * stride_xh + rows * stride_xs
    top, share = _softmax_of(x_rows, present, FEATURES, PADDED_FEATURES, MAP)
    values, total = _times_features(
        x_rows, present, top, share, state_ptr, dims, FEATURES, PADDED_FEATURES, PADDED_DIM, TILE, CHUNK, MAP, PARTS,
        STATE_PARTS, WIDTH, WIDEN,
    )  # fmt: skip
    some = total > 0
    out = tl.where(some[:, None], values / tl.where(some, total, 1.0)[:, None], 0.0)

    inside = present[:, None] & (dims < HEAD_DIM)[None, :]
    if weight_ptr is not None:
        out = _project(out, weight_ptr, bias_ptr, dims, HEAD_DIM, WIDEN)
    if exact_ptr is not None:
        exact = exact_ptr + head * stride_exh + rows[:, None] * stride_exs + dims[None, :]
        exact = tl.load(exact, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is None:
            out -= exact
        if shares_ptr is not None:
            out *= tl.load(shares_ptr + head * stride_sh + block).to(tl.float32)
        out += exact
    at = out_ptr + head * stride_oh + rows[:, None] * stride_os + dims[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradients_kernel(
    x_ptr, y_ptr, sums_ptr, lengths_ptr, weights_ptr, dx_ptr, dy_ptr,
    stride_xh, stride_xs, stride_vh, stride_vs, stride_lh, stride_dxh, stride_dxs, stride_dvh, stride_dvs,
    tokens, num_sums,
    FEATURES: tl.constexpr, PADDED_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, MAP: tl.constexpr, PARTS: tl.constexpr,
    STATE_PARTS: tl.constexpr, WIDTH: tl.constexpr, WIDEN: tl.constexpr, OF_QUERIES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) // (BLOCK // TILE)
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, PADDED_DIM)
    inside = rows < tokens
    if OF_QUERIES:
        present = inside
    else:
        present = rows - block.to(tl.int64) * BLOCK < tl.load(lengths_ptr + head * stride_lh + block)
    state_ptr = sums_ptr + (head * num_sums + tl.minimum(block, num_sums - 1)) * (STATE_PARTS * WIDTH)
    x_rows = x_ptr + head * stride_xh + rows * stride_xs
    top, share = _softmax_of(x_rows, present, FEATURES, PADDED_FEATURES, MAP)
    values, total = _times_features(
        x_rows, present, top, share, state_ptr, dims, FEATURES, PADDED_FEATURES, PADDED_DIM, TILE, CHUNK, MAP, PARTS,
        STATE_PARTS, WIDTH, WIDEN,
    )  # fmt: skip

    some = present[:, None] & (dims < HEAD_DIM)[None, :]
    y = tl.load(y_ptr + head * stride_vh + rows[:, None] * stride_vs + dims[None, :], mask=some, other=0.0)
    if PARTS > 1:
        y = y.to(tl.float32)
    of_products = tl.sum(y.to(tl.float32) * values, 1)
    if OF_QUERIES:
        weight = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
        alone = -weight * weight * of_products
        weights = weights_ptr + head * 2 * tokens + rows
        tl.store(weights, weight, mask=inside)
        tl.store(weights + tokens, alone, mask=inside)
        # Scaling all features of a query leaves the output unchanged, so the gradient has no such component.
        along = tl.zeros([TILE], tl.float32)
    else:
        weight = tl.full([TILE], 1.0, tl.float32)
        alone = weight
        along = of_products + total
        dy = dy_ptr + head * stride_dvh + rows[:, None] * stride_dvs + dims[None, :]
        tl.store(dy, values.to(dy_ptr.dtype.element_ty), mask=inside[:, None] & (dims < HEAD_DIM)[None, :])

    for first in tl.range(0, PADDED_FEATURES, CHUNK):
        features = first + tl.arange(0, CHUNK)
        x, f = _features(x_rows, present, top, share, features, FEATURES, MAP, PARTS)
        z = _load_sum(state_ptr + PADDED_FEATURES * PADDED_DIM + features, STATE_PARTS, WIDTH)
        state = state_ptr + (dims[:, None] * PADDED_FEATURES + features[None, :])
        df = _add_times_state(y, state, None, PARTS, STATE_PARTS, WIDTH, WIDEN)
        df = df * weight[:, None] + alone[:, None] * z[None, :]
        if MAP == "softmax":
            df = f * (df - along[:, None])
        elif MAP == "elu":
            df = tl.where(x > 0, df, df * f)
        elif MAP == "relu":
            df = tl.where(x > 0, df, 0.0)
        df = tl.where(present[:, None], df, 0.0)
        target = dx_ptr + head * stride_dxh + rows[:, None] * stride_dxs + features[None, :]
        tl.store(target, df.to(dx_ptr.dtype.element_ty), mask=inside[:, None] & (features < FEATURES)[None, :])


@dataclass(frozen=True, eq=False)
class Join:
    """The exact part that a linear output is joined to: ``exact + share * (linear W^T + b)``.

    Args:
        exact: ``(h, S, D)`` output of the exact part, last axis contiguous.
        shares: ``(h, N)`` share of each query block, bool or floating, last axis contiguous; ``None`` for 1.
        weight: ``(D, D)`` projection ``W``, contiguous; ``None`` for a mix, ``exact + share * (linear - exact)``.
        bias: ``(D,)`` its ``b``, contiguous.
    """

    exact: Tensor
    shares: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def output_of(
    q: Tensor, sums: Tensor, block: int, feature_map: str, config: SlaConfig, out: Tensor, join: Join | None = None
) -> None:
    """Launch the kernel for the output.

    Args:
        q: ``(h, S, E)`` queries or their features, last axis contiguous.
        sums: ``(h, N or 1, parts, width)`` bf16 states of the query blocks.
        block: Tokens per block, a multiple of 16.
        feature_map: One of ``MAPS``.
        config: The settings.
        out: ``(h, S, D)``, is written; last axis contiguous.
        join: What it is joined to before it is written; ``None`` for nothing.
    """
    heads, tokens, features = q.shape
    constants = token_constants(features, out.shape[2], q.dtype, block, feature_map, config.output)
    exact, shares, weight, bias = (None,) * 4 if join is None else (join.exact, join.shares, join.weight, join.bias)
    _output_kernel[(triton.cdiv(tokens, constants["TILE"]), heads)](
        q, sums, out, exact, shares, weight, bias,
        *q.stride()[:2], *out.stride()[:2], *(out if exact is None else exact).stride()[:2],
        0 if shares is None else shares.stride(0),
        tokens, sums.shape[1],
        **constants, **token_options(config.output),
    )  # fmt: skip


def gradients_of(
    x: Tensor,
    y: Tensor,
    sums: Tensor,
    lengths: Tensor,
    block: int,
    feature_map: str,
    config: SlaConfig,
    dx: Tensor,
    dy: Tensor | None,
    weights: Tensor | None,
) -> None:
    """Launch the kernel for gradients: of queries if there are weights to be written, else of keys and values.

    Arguments as for ``output_of``.

    Args:
        x: ``(h, S, E)`` queries, keys, or the features of either, last axis contiguous.
        y: ``(h, S, D)`` gradient of the output, or values, likewise.
        lengths: ``(h, N)`` int32, real keys of each block, last axis contiguous.
        dx: ``(h, S, E)``, is written; last axis contiguous.
        dy: ``(h, S, D)``, is written for values, likewise; ``None`` for queries.
        weights: ``(h, 2, S)`` fp32, is written for queries: what ``sum_blocks_up`` takes; ``None`` for keys.
    """
    heads, tokens, features = x.shape
    constants = token_constants(features, y.shape[2], x.dtype, block, feature_map, config.gradients)
    other = dx if dy is None else dy
    _gradients_kernel[(triton.cdiv(tokens, constants["TILE"]), heads)](
        x, y, sums, lengths,
        sums if weights is None else weights,  # not written
        dx, other,
        *x.stride()[:2], *y.stride()[:2], lengths.stride(0), *dx.stride()[:2], *other.stride()[:2],
        tokens, sums.shape[1],
        **constants, OF_QUERIES=weights is not None, **token_options(config.gradients),
    )  # fmt: skip
