"""Which tiles the backward kernels use on which GPU: plain data, as in ``triton_config.py``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .triton_config import Config, table_arch


@dataclass(frozen=True)
class BackwardConfig:
    """Settings of the kernels that multiply.

    Args:
        dq: Of the kernel for queries, which holds ``tile_q`` of them and iterates over keys.
        dkdv: Of the kernel for keys and values, which holds ``tile_k`` of them and iterates over queries.
        means: Of the kernel for means, which holds ``tile_k`` of them and iterates over queries.
    """

    dq: Config
    dkdv: Config
    means: Config


_ARCHITECTURES = (80, 89, 90, 100, 120)
_SMALL = (Config(32, 32, 4, 2), Config(16, 16, 4, 2))
# fp32 takes three products for one, and their registers.
_SINGLE_64 = (Config(32, 32, 8, 2), Config(16, 16, 8, 2))
_SINGLE_128 = (Config(16, 16, 8, 2),)
_DQ_64 = (Config(128, 64, 8, 2), Config(64, 64, 4, 2), *_SMALL)
_DQ_128 = (Config(128, 32, 8, 2), Config(64, 64, 4, 2), *_SMALL)
# Tensor cores that read their operands from shared memory leave registers for more keys.
_DQ_128_WIDE = (Config(128, 64, 8, 2), Config(64, 64, 4, 2), *_SMALL)
_DKDV_64 = (Config(64, 128, 8, 2), Config(64, 64, 8, 2), *_SMALL)
# Two sums are kept here, which with 128 keys takes every register that there is.
# With two stages the assembler would rather spill than give up a program per multiprocessor.
_DKDV_128 = (Config(64, 64, 8, 2), Config(32, 32, 4, 3), Config(16, 16, 4, 2))
_DKDV_128_WIDE = (Config(64, 128, 8, 2), *_DKDV_128)

# (architecture, head dim, bits per element): best first. The first whose tiles divide the mask's blocks is used.
DQ_TABLE: dict[tuple[int, int, int], tuple[Config, ...]] = {
    **{(arch, 64, 16): _DQ_64 for arch in _ARCHITECTURES},
    (100, 64, 16): (Config(128, 64, 8, 2), Config(64, 64, 8, 2), *_SMALL),  # with 4 warps means spill
    **{(arch, 128, 16): _DQ_128_WIDE if arch in (90, 100) else _DQ_128 for arch in _ARCHITECTURES},
    **{(arch, 64, 32): _SINGLE_64 for arch in _ARCHITECTURES},
    **{(arch, 128, 32): _SINGLE_128 for arch in _ARCHITECTURES},
}
DKDV_TABLE: dict[tuple[int, int, int], tuple[Config, ...]] = {
    **{(arch, 64, 16): _DKDV_64 for arch in _ARCHITECTURES},
    **{(arch, 128, 16): _DKDV_128_WIDE if arch in (90, 100) else _DKDV_128 for arch in _ARCHITECTURES},
    **{(arch, 64, 32): _SINGLE_64 for arch in _ARCHITECTURES},
    **{(arch, 128, 32): _SINGLE_128 for arch in _ARCHITECTURES},
}
MEANS_TABLE: dict[tuple[int, int, int], tuple[Config, ...]] = {
    **DKDV_TABLE,
    # Triton 3.6: wider tiles spill at head dim 32, and on 9.0 products of eight warps wait for each other.
    (80, 64, 16): _DKDV_64[1:],
    (89, 64, 16): _DKDV_64[1:],
    (90, 128, 16): (Config(64, 128, 8, 2), Config(64, 64, 4, 2), *_DKDV_128[1:]),
    (120, 64, 32): (Config(16, 16, 4, 2),),  # larger tiles spill at head dim 32
}


def choose_backward(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype, block_q: int, block_k: int
) -> BackwardConfig:
    """Return the best settings for a call.

    Args:
        capability: Compute capability of the GPU, ``(8, 0)`` or later.
        head_dim: In [16, 128].
        dtype: bf16, fp16 or fp32.
        block_q: Queries in a block of the mask, a multiple of 16.
        block_k: Keys in a block of the mask, a multiple of 16.
    """
    key = table_arch(capability), 64 if head_dim <= 64 else 128, dtype.itemsize * 8
    return BackwardConfig(
        *(
            next(c for c in table[key] if block_q % c.tile_q == 0 and block_k % c.tile_k == 0)
            for table in (DQ_TABLE, DKDV_TABLE, MEANS_TABLE)
        )
    )
