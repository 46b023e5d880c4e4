"""Requirements and tile sizes of the kernels of linear attention, as plain data like ``triton/tiles.py``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...device import _capability, _interpreted, available
from ..tiles import table_arch


@dataclass(frozen=True)
class TokenConfig:
    """Settings of a kernel that reads tokens.

    Args:
        tile: Tokens at a time, a power of two of at least 16; it divides the block.
        chunk: Features at a time, a power of two of at least 16.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
    """

    tile: int
    chunk: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SlaConfig:
    """Settings of the kernels of linear attention.

    Args:
        states: Of the kernel that sums a block up.
        output: Of the kernel for the output, joined to the exact part or not.
        gradients: Of the kernel for gradients of queries, keys and values.
        rows: Query blocks that a program of the sums over blocks holds, a power of two of at least 16.
        step: States that one iteration of it reads, likewise.
    """

    states: TokenConfig
    output: TokenConfig
    gradients: TokenConfig
    rows: int = 128
    step: int = 64


_ARCHITECTURES = (80, 89, 90, 100, 120)
# With two stages the assembler spills to keep one more program per multiprocessor.
_TOKENS_64 = TokenConfig(64, 64, 8, 3)
_TOKENS_128 = TokenConfig(64, 32, 8, 2)
_HALF_64 = SlaConfig(TokenConfig(64, 64, 4, 2), _TOKENS_64, _TOKENS_64)
_HALF_128 = SlaConfig(TokenConfig(32, 128, 8, 2), _TOKENS_128, _TOKENS_128)
# fp16 takes three products instead of one; products fed from registers leave room for half of the features.
_HALF_128_LESS = SlaConfig(TokenConfig(32, 64, 8, 2), _TOKENS_128, _TOKENS_128)
# Tensor cores that read their operands from shared memory leave registers for more tokens.
_HALF_128_WIDE = SlaConfig(TokenConfig(64, 128, 8, 2), _TOKENS_128, _TOKENS_128)
# fp32 takes six products instead of one, and their registers.
_SINGLE_64 = SlaConfig(TokenConfig(32, 64, 8, 2), TokenConfig(32, 16, 8, 2), TokenConfig(32, 16, 8, 2), step=32)
_SINGLE_128 = SlaConfig(TokenConfig(16, 64, 8, 2), TokenConfig(32, 16, 8, 2), TokenConfig(32, 32, 8, 2), step=32)

# (architecture, head dim, bits per element). Tiles are cut to what divides the block, chunks to the features.
TABLE: dict[tuple[int, int, int], SlaConfig] = {
    **{(arch, 64, 16): _HALF_64 for arch in _ARCHITECTURES},
    (120, 64, 16): SlaConfig(TokenConfig(32, 64, 4, 2), _TOKENS_64, _TOKENS_64),  # twice the tokens spill in fp16
    (80, 128, 16): _HALF_128,
    (89, 128, 16): _HALF_128_LESS,
    (90, 128, 16): _HALF_128_WIDE,
    (100, 128, 16): _HALF_128,
    (120, 128, 16): _HALF_128_LESS,
    **{(arch, 64, 32): _SINGLE_64 for arch in _ARCHITECTURES},
    **{(arch, 128, 32): _SINGLE_128 for arch in _ARCHITECTURES},
}


def linear_reason(q: Tensor, v: Tensor, block: int) -> str | None:
    """Return why the kernels cannot run for these arguments, or ``None``.

    Args:
        q: ``(B, H, S, E)`` queries or their features.
        v: ``(B, H, S, D)`` values.
        block: Tokens per block, at least 1.
    """
    if (reason := available()) is not None:
        return reason
    if not v.is_cuda and not (_interpreted() and v.device.type == "cpu"):
        return f"it needs CUDA tensors, got {v.device}"
    if _capability(v) < (8, 0):
        return f"it needs compute capability 8.0 or later, {v.device} has {'.'.join(map(str, _capability(v)))}"
    if v.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it takes bf16, fp16 and fp32, got {v.dtype}"
    if not 16 <= v.shape[3] <= 128 or not 16 <= q.shape[3] <= 256:
        return f"it takes head dims in [16, 128] and up to 256 features, got {v.shape[3]} and {q.shape[3]}"
    return None if block % 16 == 0 else f"it takes blocks of a multiple of 16 tokens, got {block}"


def choose_sla(v: Tensor) -> SlaConfig:
    """Return the settings for a call.

    Args:
        v: ``(B, H, S, D)`` values, of a GPU that the kernels run on, D in [16, 128].
    """
    return TABLE[table_arch(_capability(v)), 64 if v.shape[3] <= 64 else 128, v.dtype.itemsize * 8]
