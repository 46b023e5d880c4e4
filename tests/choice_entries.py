"""The kernels that choose blocks, for the compile gate: see ``kernel_entries.py``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kernel_compile import TENSOR_CORES, TYPES, Entry

from fastdit.attention.kernels.triton_mass import _block_mass_kernel, mass_constants, mass_options

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def block_mass() -> Iterator[Entry]:
    """Yield the exact mass of blocks, with one pass and with two."""
    cases = [(128, BF16, 128, True), (128, BF16, 64, False), (64, BF16, 64, True), (96, FP16, 256, False)]
    cases += [(32, BF16, 16, True), (128, FP32, 64, True), (64, FP32, 64, False)]
    for arch in TENSOR_CORES:
        for dim, dtype, block, normalise in cases:
            constexprs = mass_constants(dim, dtype, block, normalise=normalise)
            wide = constexprs["TILE_Q"] >= 64
            yield Entry(
                name=f"sm_{arch}-mass-{TYPES[dtype]}-{dim}-{block}{'-normalise' if normalise else ''}",
                arch=arch,
                kernel=_block_mass_kernel,
                constants=constexprs,
                options=mass_options(dtype, constexprs["TILE_Q"]),
                types={"q_ptr": f"*{TYPES[dtype]}", "k_ptr": f"*{TYPES[dtype]}"}
                | {"lse_ptr": "*fp32", "mass_ptr": "*fp32", "scale": "fp32"},
                tensor_op=TENSOR_CORES[arch] if wide else "HMMA",
                quick=(arch, dim, dtype) == (80, 64, BF16),
            )


CHOICE = (block_mass,)
