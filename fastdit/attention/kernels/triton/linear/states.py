"""States of linear attention: sums over a block of tokens, and sums of these over listed blocks.

A state is ``y^T f(x)`` summed over tokens, and ``f(x)`` summed beside it. It lies in memory as bf16 numbers that add up
to it, so that every product is one of tensor cores in 16 bits and nothing but their order limits the precision of the
sums: a map of blocks is 0 and 1, which is exact. All sums are in fp32, and every one is made by a single program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives import _dot
from .tiles import SlaConfig, TokenConfig

MAPS = ("softmax", "elu", "relu", "given")
"""Feature maps that the kernels compute themselves; ``"given"`` for features that come in as tensors."""

COLUMNS = 128  # most numbers of a state that one program sums


@triton.jit
def _add_product(a, b, acc, PARTS: tl.constexpr, WIDEN: tl.constexpr):
    if PARTS == 1:
        return _dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc, WIDEN, "tf32")
    rest_a = a.to(tl.float32)
    for i in tl.static_range(PARTS):
        part_a = rest_a.to(tl.bfloat16)
        rest_a -= part_a.to(tl.float32)
        rest_b = b.to(tl.float32)
        # Products of parts below the precision of the sum are skipped.
        for _ in tl.static_range(PARTS - i):
            part_b = rest_b.to(tl.bfloat16)
            rest_b -= part_b.to(tl.float32)
            acc = _dot(part_a, part_b, acc, WIDEN, "tf32")
    return acc


@triton.jit
def _softmax_of(x_rows, present, FEATURES: tl.constexpr, PADDED_FEATURES: tl.constexpr, MAP: tl.constexpr):
    if MAP == "softmax":
        every = tl.arange(0, PADDED_FEATURES)
        inside = (every < FEATURES)[None, :]
        x = tl.load(x_rows[:, None] + every[None, :], mask=present[:, None] & inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x, float("-inf"))
        top = tl.max(x, 1)
        return top, 1.0 / tl.sum(tl.exp(x - top[:, None]), 1)
    else:
        return 0.0, 0.0


@triton.jit
def _features(x_rows, present, top, share, features, FEATURES: tl.constexpr, MAP: tl.constexpr, PARTS: tl.constexpr):
    some = present[:, None] & (features < FEATURES)[None, :]
    x = tl.load(x_rows[:, None] + features[None, :], mask=some, other=0.0).to(tl.float32)
    if MAP == "softmax":
        f = tl.exp(x - top[:, None]) * share[:, None]
    elif MAP == "elu":
        f = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == "relu":
        f = tl.maximum(x, 0.0)
    else:
        f = x
    if PARTS == 1:
        # Rounded once, so that numerators and denominators are sums of the same weights.
        f = f.to(tl.bfloat16).to(tl.float32)
    return x, tl.where(some, f, 0.0)


@triton.jit
def _store_parts(target, x, present, STATE_PARTS: tl.constexpr, WIDTH: tl.constexpr):
    for i in tl.static_range(STATE_PARTS):
        part = x.to(tl.bfloat16)
        tl.store(target + i * WIDTH, part, mask=present)
        x -= part.to(tl.float32)


@triton.jit
def _states_kernel(
    x_ptr, y_ptr, weights_ptr, lengths_ptr, states_ptr,
    stride_xh, stride_xs, stride_vh, stride_vs, stride_lh,
    tokens, num_blocks, blocks_each,
    FEATURES: tl.constexpr, PADDED_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, MAP: tl.constexpr, PARTS: tl.constexpr,
    STATE_PARTS: tl.constexpr, WIDTH: tl.constexpr, WIDEN: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    SPLIT: tl.constexpr = BLOCK // TILE
    head = tl.program_id(2).to(tl.int64)
    features = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    dims = tl.arange(0, PADDED_DIM)
    offsets = tl.arange(0, TILE)
    x_head = x_ptr + head * stride_xh
    y_head = y_ptr + head * stride_vh
    first = tl.program_id(0) * blocks_each
    count = tl.maximum(tl.minimum(blocks_each, num_blocks - first), 0)

    state = tl.zeros([PADDED_DIM, CHUNK], tl.float32)
    alone = tl.zeros([CHUNK], tl.float32)
    for i in tl.range(0, count * SPLIT):
        block = first + i // SPLIT
        within = i % SPLIT * TILE + offsets
        rows = block.to(tl.int64) * BLOCK + within
        present = rows < tokens if WEIGHTED else within < tl.load(lengths_ptr + head * stride_lh + block)
        x_rows = x_head + rows * stride_xs
        top, share = _softmax_of(x_rows, present, FEATURES, PADDED_FEATURES, MAP)
        _, f = _features(x_rows, present, top, share, features, FEATURES, MAP, PARTS)
        some = present[:, None] & (dims < HEAD_DIM)[None, :]
        y = tl.load(y_head + rows[:, None] * stride_vs + dims[None, :], mask=some, other=0.0)
        if WEIGHTED:
            weights = weights_ptr + head * 2 * tokens + rows
            alone += tl.sum(f * tl.load(weights + tokens, mask=present, other=0.0)[:, None], 0)
            f *= tl.load(weights, mask=present, other=0.0)[:, None]
        else:
            alone += tl.sum(f, 0)
        # Features come from registers: as the second factor they go to shared memory, where products can wait for them.
        state = _add_product(tl.trans(y), f, state, PARTS, WIDEN)

    target = states_ptr + (head * tl.num_programs(0) + tl.program_id(0)) * STATE_PARTS * WIDTH
    _store_parts(target + dims[:, None] * PADDED_FEATURES + features[None, :], state, None, STATE_PARTS, WIDTH)
    _store_parts(target + PADDED_FEATURES * PADDED_DIM + features, alone, None, STATE_PARTS, WIDTH)


@triton.jit
def _sums_kernel(
    map_ptr, states_ptr, sums_ptr,
    stride_xh,
    num_rows, steps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, STATE_PARTS: tl.constexpr, WIDTH: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    blocks = tl.arange(0, STEP)
    map_tile = map_ptr + head * stride_xh + (rows[:, None] * steps * STEP + blocks[None, :])
    states_tile = states_ptr + head * steps * (STEP * STATE_PARTS * WIDTH)
    states_tile += blocks[:, None] * (STATE_PARTS * WIDTH) + columns[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in tl.range(0, steps):
        listed = tl.load(map_tile + i * STEP)
        some = states_tile + tl.cast(i, tl.int64) * (STEP * STATE_PARTS * WIDTH)
        for part in tl.static_range(STATE_PARTS):
            acc = _dot(listed, tl.load(some + part * WIDTH), acc, WIDEN, "tf32")
    target = sums_ptr + (head * num_rows + rows[:, None]) * (STATE_PARTS * WIDTH) + columns[None, :]
    _store_parts(target, acc, (rows < num_rows)[:, None], STATE_PARTS, WIDTH)


def sum_blocks_up(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    lengths: Tensor,
    block: int,
    feature_map: str,
    config: SlaConfig,
    states: Tensor,
) -> None:
    """Launch the kernel that sums blocks of tokens up, each program as many as it takes to get to the last.

    Args:
        x: ``(h, S, E)`` what features are made of, last axis contiguous.
        y: ``(h, S, D)`` values, likewise.
        weights: ``(h, 2, S)`` fp32 weight of each token in the products, and in the sum of features alone; ``None``
            for 1, of real tokens only.
        lengths: ``(h, N)`` int32, real tokens of each block, last axis contiguous.
        block: Tokens per block, a multiple of 16.
        feature_map: One of ``MAPS``.
        config: The settings.
        states: ``(h, n, parts, width)`` bf16, is written: n a multiple of the configuration's step.
    """
    heads, tokens, features = x.shape
    num_blocks = lengths.shape[-1]
    constants = token_constants(features, y.shape[2], x.dtype, block, feature_map, config.states)
    chunks = constants["PADDED_FEATURES"] // constants["CHUNK"]
    _states_kernel[(states.shape[1], chunks, heads)](
        x, y,
        states if weights is None else weights,  # not read
        lengths, states,
        *x.stride()[:2], *y.stride()[:2], lengths.stride(0),
        tokens, num_blocks, triton.cdiv(num_blocks, states.shape[1]),
        **constants, WEIGHTED=weights is not None, **token_options(config.states),
    )  # fmt: skip


def sum_states(
    listed: Tensor, states: Tensor, config: SlaConfig, constants: dict[str, int | bool], sums: Tensor
) -> None:
    """Launch the kernel that sums states over listed blocks: a product with the map of blocks.

    Args:
        listed: ``(h, m, n)`` bf16, 1 where a state is in the sum and else 0; m a multiple of its rows. Contiguous, but
            for heads, which may share one map.
        states: ``(h, n, parts, width)`` bf16, n a multiple of the configuration's step.
        config: The settings.
        constants: The compile-time arguments.
        sums: ``(h, rows, parts, width)`` bf16, is written: at most m rows.
    """
    heads, num_states = states.shape[:2]
    grid = triton.cdiv(sums.shape[1], config.rows), states.shape[3] // constants["COLUMNS"], heads
    _sums_kernel[grid](
        listed, states, sums,
        listed.stride(0),
        sums.shape[1], num_states // config.step,
        **constants, **sums_options(config),
    )  # fmt: skip


def state_width(features: int, head_dim: int) -> int:
    """Return how many numbers a state has in memory: products of features and values, then features alone.

    Args:
        features: Features of a token, at least 1.
        head_dim: Channels of a value, at least 1.
    """
    return triton.next_power_of_2(features) * (triton.next_power_of_2(head_dim) + 1)


def state_parts(dtype: torch.dtype) -> int:
    """Return how many bf16 numbers add up to one of a state: 16 bits of it for half precision, else all 24.

    Args:
        dtype: Dtype of queries, keys and values.
    """
    return 3 if dtype == torch.float32 else 2


def token_constants(
    features: int, head_dim: int, dtype: torch.dtype, block: int, feature_map: str, config: TokenConfig
) -> dict[str, int | bool | str]:
    """Return the compile-time arguments of a kernel that reads tokens.

    Args:
        features: Features of a token, in [16, 256]; those of a feature map as many as channels.
        head_dim: In [16, 128].
        dtype: Dtype of queries, keys and values.
        block: Tokens per block, a multiple of 16.
        feature_map: One of ``MAPS``.
        config: The settings.
    """
    padded = triton.next_power_of_2(features)
    return {
        "FEATURES": features,
        "PADDED_FEATURES": padded,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": triton.next_power_of_2(head_dim),
        "BLOCK": block,
        "TILE": min(config.tile, block & -block),
        "CHUNK": min(config.chunk, padded),
        "MAP": feature_map,
        # How many bf16 numbers add up exactly to one of the inputs' dtype.
        "PARTS": {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}[dtype],
        "STATE_PARTS": state_parts(dtype),
        "WIDTH": state_width(features, head_dim),
        "WIDEN": triton.knobs.runtime.interpret,
    }


def sums_constants(features: int, head_dim: int, dtype: torch.dtype, config: SlaConfig) -> dict[str, int | bool]:
    """Return the compile-time arguments of the kernel that sums states over blocks.

    Arguments as for ``token_constants``.
    """
    return {
        "ROWS": config.rows,
        "COLUMNS": min(COLUMNS, triton.next_power_of_2(features)),
        "STEP": config.step,
        "STATE_PARTS": state_parts(dtype),
        "WIDTH": state_width(features, head_dim),
        "WIDEN": triton.knobs.runtime.interpret,
    }


def token_options(config: TokenConfig) -> dict[str, int]:
    """Return how a kernel that reads tokens is compiled.

    Args:
        config: The settings.
    """
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def sums_options(config: SlaConfig) -> dict[str, int]:
    """Return how the kernel that sums states over blocks is compiled.

    Args:
        config: The settings.
    """
    return {"num_warps": max(4, config.rows // 16), "num_stages": 3}
