"""The kernels in low precision with every setting that a table can choose, for the compile gate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
from kernel_compile import TENSOR_CORES, TYPES, Entry

from fastdit.attention.kernels.options import Options
from fastdit.attention.kernels.triton.int8 import _int8_fwd_kernel, int8_constants
from fastdit.attention.kernels.triton.primitives import compile_options
from fastdit.attention.kernels.triton.quantize import (
    _largest_values_kernel,
    _quantize_blocks_kernel,
    _quantize_values_kernel,
    quantize_constants,
    quantize_options,
)
from fastdit.attention.kernels.triton.tiles import TABLE_INT8, Config

BF16, FP16 = torch.bfloat16, torch.float16
INDEX = torch.zeros(1, 1, dtype=torch.int64)
MIN_WIDE_TILE = 64  # queries in a tile, below which sm_90 uses the instruction of earlier GPUs
# What multiplies int8, and fp8; where sm_90 has small tiles, fp8 is widened to 16 bits.
INT8_OPS = {80: "IMMA", 89: "IMMA", 90: "IGMMA", 120: "IMMA"}
FP8_OPS = {89: "QMMA", 90: "QGMMA", 120: "QMMA"}


def low_precision() -> Iterator[Entry]:
    """Yield the forward kernel in int8 and in int8 with fp8, each with means and without, in order and gathered."""
    for (arch, dim, precision), configs in TABLE_INT8.items():
        for compensate in (None, "mean"):
            options = Options(1.0, compensate, precision)
            for rank, config in enumerate(configs):
                # The best one is compiled for a mask whose blocks are larger than its tiles.
                blocks = (128, 128) if rank == 0 else (config.tile_q, config.tile_k)
                quick = rank == 0 and (arch, dim, compensate) == (90, 128, None)
                yield fwd_entry(arch, dim, BF16, blocks, config, options, quick)
            if compensate is None:
                yield fwd_entry(arch, dim, FP16, (128, 128), configs[0], options)
                yield fwd_entry(arch, 96 if dim == 128 else 32, BF16, (128, 128), configs[0], options)
            else:
                # Queries are gathered for the means alone, behind the loops.
                gathered = replace(options, index=INDEX)
                yield fwd_entry(arch, dim, BF16, (128, 128), configs[0], gathered)


def fwd_entry(
    arch: int,
    head_dim: int,
    dtype: torch.dtype,
    blocks: tuple[int, int],
    config: Config,
    options: Options,
    quick: bool = False,
) -> Entry:
    """Make the entry of one forward kernel, in which both products must be those of tensor cores."""
    fp8, means = options.precision == "int8_fp8", options.compensate is not None
    constants = int8_constants(head_dim, options, *blocks, config)
    types = dict.fromkeys(("q_ptr", "v_ptr", "out_ptr", "mean_k_ptr", "mean_v_ptr"), f"*{TYPES[dtype]}")
    types |= dict.fromkeys(("q8_ptr", "k8_ptr", "dropped_ptr"), "*i8") | {"scale": "fp32"}
    types |= {"index_ptr": "*i64"} if constants["INDEXED"] else {}
    types |= dict.fromkeys(("q_scales_ptr", "k_scales_ptr", "v_scales_ptr", "lse_ptr"), "*fp32")
    if fp8:
        types["v_ptr"] = "*fp8e4nv"
    wide = config.tile_q >= MIN_WIDE_TILE
    name = f"sm_{arch}-{options.precision}-{TYPES[dtype]}-{head_dim}-{config.tile_q}x{config.tile_k}"
    name += f"x{config.num_warps}x{config.num_stages}{'-means' if means else ''}"
    name += "-gathered" if constants["INDEXED"] else ""
    first, second = INT8_OPS[arch], (FP8_OPS if fp8 else TENSOR_CORES)[arch]
    return Entry(
        name=name,
        arch=arch,
        kernel=_int8_fwd_kernel,
        constants=constants,
        options=compile_options(config),
        types=types,
        # First one, then, anywhere behind it, the other.
        tensor_op=rf"{first}\b(?s:.*?)\b{second}" if wide else r"IMMA\b(?s:.*?)\b[HQ]MMA",
        plain_loops=int(means and constants["MEANS_STAGES"] == 1),
        quick=quick,
    )


def rounding() -> Iterator[Entry]:
    """Yield the kernels that quantise, which multiply nothing, of tokens in order and gathered."""
    kernels = {
        "queries": (_quantize_blocks_kernel, {"QUERIES": True, "POOL": True}),
        "keys": (_quantize_blocks_kernel, {"QUERIES": False, "POOL": False}),
        "largest": (_largest_values_kernel, {}),
        "values": (_quantize_values_kernel, {"ROUND": False}),
    }
    singles = ("mean_ptr", "scales_ptr", "lost_ptr", "means_ptr", "largest_ptr")
    for arch in INT8_OPS:
        for name, (kernel, own) in kernels.items():
            if name == "values" and arch not in FP8_OPS:
                continue
            for (dim, block), indexed in product(((128, 128), (72, 64), (128, 384)), (False, True)):
                types = {"x_ptr": "*bf16", "rounded_ptr": "*fp8e4nv" if name == "values" else "*i8", "scale": "fp32"}
                types |= dict.fromkeys(singles, "*fp32") | ({"index_ptr": "*i64"} if indexed else {})
                yield Entry(
                    name=f"sm_{arch}-round-{name}-{dim}-{block}{'-gathered' if indexed else ''}",
                    arch=arch,
                    kernel=kernel,
                    constants=quantize_constants(dim, block, indexed=indexed) | own,
                    options=quantize_options(),
                    types={name: kind for name, kind in types.items() if name in kernel.arg_names},
                    tensor_op=None,
                    quick=(arch, dim, block) == (90, 128, 128),
                )


PRECISION = (low_precision, rounding)
