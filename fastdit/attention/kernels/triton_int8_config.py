"""Which tiles the kernel in low precision uses on which GPU: plain data; and where it is of no use."""

from __future__ import annotations

import torch

from .triton_config import Config, table_arch

_INT8 = (Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(32, 32, 4, 2), Config(16, 32, 4, 2), Config(16, 16, 4, 2))
_INT8_FP8 = _INT8[:-1]  # a product of 8-bit numbers sums over 32 of them at least

# (architecture, head dim, precision): best first. The first whose tiles divide the mask's blocks is used.
# Where one differs from the others of its kind, theirs spills there.
# 10.x and 11.x have no row: their tensor memory takes no int8, and what is left for it is slower than their bf16.
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


def choose_int8_config(
    capability: tuple[int, int], head_dim: int, precision: str, block_q: int, block_k: int
) -> Config:
    """Return the best settings for a call that ``int8_reason`` has nothing against.

    Args:
        capability: Compute capability of the GPU, ``(8, 0)`` or later.
        head_dim: In [16, 128].
        precision: ``"int8"`` or ``"int8_fp8"``.
        block_q: Queries in a block of the mask, a multiple of 16.
        block_k: Keys in a block of the mask, likewise; of 32 for ``"int8_fp8"``.
    """
    configs = TABLE_INT8[table_arch(capability), 64 if head_dim <= 64 else 128, precision]
    return next(c for c in configs if block_q % c.tile_q == 0 and block_k % c.tile_k == 0)


def int8_reason(capability: tuple[int, int], dtype: torch.dtype, precision: str, block_k: int) -> str | None:
    """Return why a call cannot run, or cannot gain, in low precision, or ``None``.

    Args:
        capability: Compute capability of the GPU, ``(8, 0)`` or later.
        dtype: Of q, k and v.
        precision: ``"int8"`` or ``"int8_fp8"``.
        block_k: Keys in a block of the mask, a multiple of 16.
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
