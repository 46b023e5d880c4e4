"""Tile sizes of each kernel by GPU, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ARCHITECTURES = (80, 89, 90, 100, 120)


@dataclass(frozen=True)
class Config:
    """Settings of one compiled kernel.

    Args:
        tile_q: Queries a program holds, a power of two of at least 16; it divides the mask's ``block_q``.
        tile_k: Keys per inner iteration, a power of two of at least 16; it divides the mask's ``block_k``.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
        variant: How full blocks are read, one of ``options.VARIANTS``; ``"tma"`` and ``"warps"`` from compute
            capability 9.0 on, ``"warps"`` with 4 warps.
    """

    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int
    variant: str = "loads"


_BACKWARD_SMALL = (Config(32, 32, 4, 2), Config(16, 16, 4, 2))
# fp32 takes three products instead of one, and their registers.
_BACKWARD_SINGLE_64 = (Config(32, 32, 8, 2), Config(16, 16, 8, 2))
_BACKWARD_SINGLE_128 = (Config(16, 16, 8, 2),)
_DQ_64 = (Config(128, 64, 8, 2), Config(64, 64, 4, 2), *_BACKWARD_SMALL)
_DQ_128 = (Config(128, 32, 8, 2), Config(64, 64, 4, 2), *_BACKWARD_SMALL)
# Tensor cores that read their operands from shared memory leave registers for more keys.
_DQ_128_WIDE = (Config(128, 64, 8, 2), Config(64, 64, 4, 2), *_BACKWARD_SMALL)
_DKDV_64 = (Config(64, 128, 8, 2), Config(64, 64, 8, 2), *_BACKWARD_SMALL)
# This kernel keeps two accumulators, which with 128 keys take all registers.
# With two stages the assembler spills to keep one more program per multiprocessor.
_DKDV_128 = (Config(64, 64, 8, 2), Config(32, 32, 4, 3), Config(16, 16, 4, 2))
_DKDV_128_WIDE = (Config(64, 128, 8, 2), *_DKDV_128)

# (architecture, head dim, bits per element): best first. The first whose tiles divide the mask's blocks is used.
DQ_TABLE: dict[tuple[int, int, int], tuple[Config, ...]] = {
    **{(arch, 64, 16): _DQ_64 for arch in _ARCHITECTURES},
    (100, 64, 16): (Config(128, 64, 8, 2), Config(64, 64, 8, 2), *_BACKWARD_SMALL),  # with 4 warps means spill
    **{(arch, 128, 16): _DQ_128_WIDE if arch in (90, 100) else _DQ_128 for arch in _ARCHITECTURES},
    **{(arch, 64, 32): _BACKWARD_SINGLE_64 for arch in _ARCHITECTURES},
    **{(arch, 128, 32): _BACKWARD_SINGLE_128 for arch in _ARCHITECTURES},
}
DKDV_TABLE: dict[tuple[int, int, int], tuple[Config, ...]] = {
    **{(arch, 64, 16): _DKDV_64 for arch in _ARCHITECTURES},
    **{(arch, 128, 16): _DKDV_128_WIDE if arch in (90, 100) else _DKDV_128 for arch in _ARCHITECTURES},
    **{(arch, 64, 32): _BACKWARD_SINGLE_64 for arch in _ARCHITECTURES},
    **{(arch, 128, 32): _BACKWARD_SINGLE_128 for arch in _ARCHITECTURES},
}
MEANS_TABLE: dict[tuple[int, int, int], tuple[Config, ...]] = {
    **DKDV_TABLE,
    # Triton 3.6: wider tiles spill at head dim 32, and on 9.0 products of eight warps wait for each other.
    (80, 64, 16): _DKDV_64[1:],
    (89, 64, 16): _DKDV_64[1:],
    (90, 128, 16): (Config(64, 128, 8, 2), Config(64, 64, 4, 2), *_DKDV_128[1:]),
    (120, 64, 32): (Config(16, 16, 4, 2),),  # larger tiles spill at head dim 32
}

_INT8 = (Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(32, 32, 4, 2), Config(16, 32, 4, 2), Config(16, 16, 4, 2))
_INT8_FP8 = _INT8[:-1]  # a product of 8-bit numbers sums over 32 of them at least

# (architecture, head dim, precision): best first. The first whose tiles divide the mask's blocks is used.
# Rows differ where the usual tiles spill.
# 10.x and 11.x have no row: their tensor cores lack int8, and the fallback is slower than bf16.
TABLE_INT8: dict[tuple[int, int, str], tuple[Config, ...]] = {
    (80, 64, "int8"): _INT8,
    (80, 128, "int8"): _INT8,
    (89, 64, "int8"): _INT8,
    (89, 128, "int8"): _INT8,
    (89, 64, "int8_fp8"): (Config(128, 64, 8, 2), Config(64, 32, 4, 2), Config(32, 32, 2, 2), Config(16, 32, 4, 2)),
    (89, 128, "int8_fp8"): _INT8_FP8,
    (90, 64, "int8"): _INT8,
    (90, 128, "int8"): (*_INT8[:3], Config(16, 32, 8, 2), Config(16, 16, 4, 2)),
    (90, 64, "int8_fp8"): _INT8_FP8,
    (90, 128, "int8_fp8"): _INT8_FP8,
    (120, 64, "int8"): _INT8,
    (120, 128, "int8"): _INT8,
    (120, 64, "int8_fp8"): _INT8_FP8,
    (120, 128, "int8_fp8"): (Config(128, 64, 8, 3), *_INT8_FP8[1:]),
}

# With 4 warps the assembler spills to keep one more program per multiprocessor.
_SMALL = (Config(32, 32, 8, 2), Config(16, 16, 4, 2))
_HALF_64 = (Config(128, 64, 8, 2), Config(64, 64, 4, 2), *_SMALL)
# 64 x 64 with 8 warps spills: the compiler uses at most 128 registers.
_HALF_128 = (Config(128, 64, 8, 2), Config(64, 32, 4, 2), *_SMALL)
_SINGLE_64 = (Config(64, 32, 8, 3), *_SMALL)
_SINGLE_128 = (Config(32, 32, 8, 2), Config(16, 16, 4, 2))

# (architecture, head dim, bits per element): best first. The first whose tiles divide the mask's blocks is used.
TABLE: dict[tuple[int, int, int], tuple[Config, ...]] = {
    **{(arch, 64, 16): _HALF_64 for arch in _ARCHITECTURES},
    **{(arch, 128, 16): _HALF_128 for arch in _ARCHITECTURES},
    **{(arch, 64, 32): _SINGLE_64 for arch in _ARCHITECTURES},
    **{(arch, 128, 32): _SINGLE_128 for arch in _ARCHITECTURES},
    # Two programs of 64 x 64 with 4 warps share a multiprocessor.
    (90, 128, 16): (Config(128, 64, 8, 2), Config(64, 64, 4, 2), *_SMALL),
    (100, 64, 16): (Config(128, 64, 8, 2), Config(64, 64, 4, 3), *_SMALL),
    (100, 128, 32): (Config(32, 32, 8, 2), Config(16, 16, 8, 2)),
    (120, 128, 16): (Config(128, 64, 8, 2), Config(64, 32, 4, 3), *_SMALL),
    (120, 128, 32): (Config(32, 32, 8, 2), Config(16, 16, 8, 2)),
}

# By head dim: fp32 with means, on every architecture; the tiles above leave no registers for the means.
TABLE_SINGLE_MEANS: dict[int, tuple[Config, ...]] = {
    64: (Config(32, 32, 8, 2), Config(16, 16, 4, 2)),
    128: (Config(16, 16, 8, 2),),
}

# Candidates for tuning, not measured yet. On 12.0, whose products read registers, all of these tiles spill.
CANDIDATES: dict[tuple[int, int, int], tuple[Config, ...]] = {
    (90, 64, 16): (
        Config(128, 128, 8, 2, "tma"),
        Config(128, 64, 8, 2, "tma"),
        Config(64, 64, 4, 2, "tma"),
        Config(32, 32, 4, 3, "tma"),
        Config(128, 128, 8, 2),
        Config(64, 64, 4, 2, "warps"),
        Config(64, 128, 4, 2, "warps"),
    ),
    (90, 128, 16): (
        Config(128, 128, 8, 2, "tma"),
        Config(128, 64, 8, 2, "tma"),
        Config(64, 64, 4, 2, "tma"),
        Config(32, 32, 8, 2, "tma"),
        Config(128, 128, 8, 2),
        Config(128, 64, 8, 3),
        Config(64, 64, 4, 2, "warps"),
        Config(64, 128, 4, 2, "warps"),
    ),
    (100, 64, 16): (Config(32, 32, 4, 3, "tma"), Config(128, 64, 4, 2, "warps"), Config(64, 64, 4, 2, "warps")),
    (100, 128, 16): (Config(128, 64, 8, 2, "tma"), Config(32, 32, 8, 2, "tma"), Config(64, 64, 4, 2, "warps")),
}


def choose_config(
    capability: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    block_q: int,
    block_k: int,
    *,
    compensate: bool = False,
    variant: str | None = None,
) -> Config:
    """Return the best settings for a call.

    Args:
        capability: Compute capability of the GPU, ``(8, 0)`` or later.
        head_dim: In [16, 128].
        dtype: bf16, fp16 or fp32.
        block_q: Queries in a block of the mask, a multiple of 16.
        block_k: Keys in a block of the mask, a multiple of 16.
        compensate: Whether means of skipped blocks join the softmax.
        variant: The only one to choose from, or ``None``.

    Raises:
        ValueError: There are no settings for this variant.
    """
    dim = 64 if head_dim <= 64 else 128
    key = (table_arch(capability), dim, dtype.itemsize * 8)
    configs = TABLE_SINGLE_MEANS[dim] if compensate and dtype.itemsize == 4 else TABLE[key]
    if variant is not None:
        configs = tuple(c for c in (*configs, *CANDIDATES.get(key, ())) if c.variant == variant)
    for config in configs:
        if block_q % config.tile_q == 0 and block_k % config.tile_k == 0:
            return config
    raise ValueError(
        f"no settings of variant {variant!r} for compute capability {capability[0]}.{capability[1]}, {dtype}, "
        f"head dim {head_dim} and blocks of {block_q} x {block_k}; use variant 'loads'"
    )


def no_descriptor(x: Tensor) -> str | None:
    """Return why keys or values cannot be read by tensor descriptors, or ``None``.

    Args:
        x: ``(B, H, S, D)``, last axis contiguous.
    """
    odd = [stride for stride in x.stride()[:3] if stride * x.element_size() % 16]
    if odd:
        return f"strides must be multiples of 16 bytes, got {odd[0]} elements of {x.element_size()} bytes"
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        return "it must not be expanded"
    if x.data_ptr() % 16:
        return f"it must begin at a multiple of 16 bytes, got {x.data_ptr() % 16} bytes past one"
    return None


def variant_reason(variant: str, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return why a variant cannot read tensors, or ``None``.

    Args:
        variant: One of ``options.VARIANTS``.
        q: ``(B, H, Sq, D)`` queries, last axis contiguous.
        k: ``(B, H, Sk, D)`` keys, likewise.
        v: ``(B, H, Sk, D)`` values, likewise.
    """
    read = {"loads": {}, "tma": {"k": k, "v": v}, "warps": {"q": q, "k": k, "v": v}}[variant]
    reasons = [f"{name}: {reason}" for name, x in read.items() if (reason := no_descriptor(x)) is not None]
    return f"variant {variant!r} cannot read {'; '.join(reasons)}" if reasons else None


def table_arch(capability: tuple[int, int]) -> int:
    """Return the row of the table that serves a GPU.

    Args:
        capability: Compute capability, ``(8, 0)`` or later. Unknown ones are served like the nearest before them.
    """
    if capability[0] == 8:
        # 8.6 and 8.9 have less shared memory than 8.0.
        return 80 if capability == (8, 0) else 89
    return {9: 90, 10: 100, 11: 100}.get(capability[0], 120)


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


def choose_backward(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype, block_q: int, block_k: int
) -> BackwardConfig:
    """Return the best settings for a call.

    Arguments as for ``choose_config``.
    """
    key = table_arch(capability), 64 if head_dim <= 64 else 128, dtype.itemsize * 8
    return BackwardConfig(
        *(
            next(c for c in table[key] if block_q % c.tile_q == 0 and block_k % c.tile_k == 0)
            for table in (DQ_TABLE, DKDV_TABLE, MEANS_TABLE)
        )
    )


def choose_int8_config(
    capability: tuple[int, int], head_dim: int, precision: str, block_q: int, block_k: int
) -> Config:
    """Return the best settings for a call that ``int8_reason`` has nothing against.

    Arguments as for ``choose_config``.

    Args:
        precision: ``"int8"`` or ``"int8_fp8"``.
    """
    configs = TABLE_INT8[table_arch(capability), 64 if head_dim <= 64 else 128, precision]
    return next(c for c in configs if block_q % c.tile_q == 0 and block_k % c.tile_k == 0)


def int8_reason(capability: tuple[int, int], dtype: torch.dtype, precision: str, block_k: int) -> str | None:
    """Return why a call cannot run, or cannot gain, in low precision, or ``None``.

    Arguments as for ``choose_config``.

    Args:
        precision: ``"int8"`` or ``"int8_fp8"``.
    """
    version = ".".join(map(str, capability))
    if dtype.itemsize != 2:
        return f"{precision} is for bf16 and fp16, got {dtype}; cast q, k and v, or leave precision out"
    if table_arch(capability) == 100:
        return f"int8 is slower than bf16 on compute capability {version}; leave precision out"
    if precision == "int8_fp8" and capability < (8, 9):
        return f"int8_fp8 needs compute capability 8.9 or later, this is {version}; precision='int8' can run"
    if precision == "int8_fp8" and block_k % 32:
        return f"int8_fp8 takes key blocks of a multiple of 32 tokens, got {block_k}; precision='int8' can run"
    return None
