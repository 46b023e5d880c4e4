"""The kernels that choose blocks, for the compile gate: see ``kernel_entries.py``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from kernel_compile import TENSOR_CORES, TYPES, Entry

from fastdit.attention.kernels.triton.layout import _lay_out_kernel, layout_constants
from fastdit.attention.kernels.triton.lists import _lists_kernel, lists_constants
from fastdit.attention.kernels.triton.mass import _block_mass_kernel, mass_constants, mass_options
from fastdit.attention.kernels.triton.means import _block_means_kernel, means_constants

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


def copies() -> Iterator[Entry]:
    """Yield what multiplies nothing: means in an order, lists, and tokens put into an order."""
    for arch in TENSOR_CORES:
        for dim, dtype in ((128, BF16), (72, FP32)):
            pointer = f"*{TYPES[dtype]}"
            tensors = {f"{new}{name}_ptr": pointer for new in ("", "new_") for name in "abc"}
            yield plain(
                arch,
                f"ordered-means-{TYPES[dtype]}-{dim}",
                _block_means_kernel,
                means_constants(dim, 64, indexed=True),
                {"x_ptr": pointer, "means_ptr": "*fp32", "index_ptr": "*i64"},
            )
            yield plain(
                arch,
                f"layout-{TYPES[dtype]}-{dim}",
                _lay_out_kernel,
                layout_constants(3, dim),
                {**tensors, "index_ptr": "*i64"},
            )
        for num in (100, 4000):
            types = {"map_ptr": "*i8", "ragged_ptr": "*i8"}
            yield plain(arch, f"lists-{num}", _lists_kernel, lists_constants(num), types)


def plain(
    arch: int, name: str, kernel: triton.JITFunction, constexprs: dict[str, int | bool], types: dict[str, str]
) -> Entry:
    """Make an entry with default options."""
    return Entry(f"sm_{arch}-{name}", arch, kernel, constexprs, {}, types, None, quick=arch == 90 and "72" in name)


CHOICE = (block_mass, copies)
