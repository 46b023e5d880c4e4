"""The backward kernels with every setting that a table can choose, for the compile gate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import triton
from kernel_compile import TENSOR_CORES, TYPES, Entry

from fastdit.attention.kernels.triton.backward import (
    _dkdv_kernel,
    _dq_kernel,
    _rows_kernel,
    list_constants,
    rows_constants,
)
from fastdit.attention.kernels.triton.backward_means import _means_kernel
from fastdit.attention.kernels.triton.primitives import compile_options, tile_constants
from fastdit.attention.kernels.triton.tiles import DKDV_TABLE, DQ_TABLE, MEANS_TABLE, Config

MIN_WIDE_TILE = 64  # rows of a product, below which sm_90 and sm_100 use the instruction of earlier GPUs
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SINGLE = ("log_total_ptr", "delta_ptr", "lse_ptr", "mean_dk_ptr", "mean_dv_ptr")


def backward() -> Iterator[Entry]:
    """Yield the kernels for queries, for keys and values, and for means."""
    for table, kind in ((DQ_TABLE, "dq"), (DKDV_TABLE, "dkdv"), (MEANS_TABLE, "dmeans")):
        for (arch, dim, bits), configs in table.items():
            dtype = BF16 if bits == 16 else FP32
            for rank, config in enumerate(configs):
                quick = rank == 0 and kind != "dmeans" and (arch, dim, bits) == (90, 128, 16)
                blocks = (128, 128) if rank == 0 else (config.tile_q, config.tile_k)
                yield entry(kind, arch, dim, dtype, blocks, config, quick=quick)
                if kind == "dq" or (kind == "dkdv" and rank == 0):
                    yield entry(kind, arch, dim, dtype, blocks, config, means=True)
            if bits == 16:
                yield entry(kind, arch, dim, FP16, (128, 128), configs[0])
            yield entry(kind, arch, 96 if dim == 128 else 32, dtype, (128, 128), configs[0])


def row_sums() -> Iterator[Entry]:
    """Yield the kernel for sums over rows, which multiplies nothing."""
    for arch in TENSOR_CORES:
        types = {"out_ptr": "*bf16", "grad_ptr": "*bf16"} | dict.fromkeys(SINGLE[:3], "*fp32")
        yield Entry(f"sm_{arch}-rows-bf16-128", arch, _rows_kernel, rows_constants(128), {}, types, None)


def entry(
    kind: str,
    arch: int,
    head_dim: int,
    dtype: torch.dtype,
    blocks: tuple[int, int],
    config: Config,
    *,
    means: bool = False,
    quick: bool = False,
) -> Entry:
    """Make the entry of one kernel."""
    kernel = {"dq": _dq_kernel, "dkdv": _dkdv_kernel, "dmeans": _means_kernel}[kind]
    if kind == "dmeans":
        constants = tile_constants(head_dim, dtype, blocks[0], config)
    else:
        constants = list_constants(head_dim, dtype, *blocks, config, compensate=means)
    held = config.tile_q if kind == "dq" else config.tile_k
    wide = held >= MIN_WIDE_TILE and dtype != FP32
    tiles = f"{config.tile_q}x{config.tile_k}x{config.num_warps}x{config.num_stages}"
    return Entry(
        name=f"sm_{arch}-{kind}-{TYPES[dtype]}-{head_dim}-{tiles}{'-means' if means else ''}",
        arch=arch,
        kernel=kernel,
        constants=constants,
        options=compile_options(config),
        types=_types(kernel, TYPES[dtype], kind == "dmeans"),
        tensor_op=TENSOR_CORES[arch] if wide else "HMMA",
        quick=quick,
    )


def _types(kernel: triton.JITFunction, dtype: str, of_means: bool) -> Mapping[str, str]:
    data = ("q", "k", "v", "grad", "mean_k", "mean_v", "dq", "dk", "dv")
    types = {f"{name}_ptr": f"*{dtype}" for name in data} | dict.fromkeys(SINGLE, "*fp32")
    if of_means:
        types |= dict.fromkeys(("dk_ptr", "dv_ptr"), "*fp32")
    types |= {"scale": "fp32", "dropped_ptr": "*i8"}
    return {name: kind for name, kind in types.items() if name in kernel.arg_names}


BACKWARD = (backward, row_sums)
