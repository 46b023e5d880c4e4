"""Every kernel with every setting that a table can choose: what the compile gate compiles.

A kernel is added by one function that yields its entries, and its name in ``KERNELS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from backward_entries import BACKWARD
from choice_entries import CHOICE
from kernel_compile import TENSOR_CORES, TYPES, Entry
from precision_entries import PRECISION
from sla_entries import SLA

from fastdit.attention.kernels.triton.forward import _block_sparse_fwd_kernel, constants
from fastdit.attention.kernels.triton.means import _block_means_kernel, means_constants
from fastdit.attention.kernels.triton.primitives import compile_options
from fastdit.attention.kernels.triton.tiles import CANDIDATES, TABLE, TABLE_SINGLE_MEANS, Config

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MIN_WIDE_TILE = 64  # queries in a tile, below which sm_90 and sm_100 use the instruction of earlier GPUs


def fwd() -> Iterator[Entry]:
    """Yield the forward kernel, with means and without."""
    for (arch, dim, bits), configs in TABLE.items():
        for means in (False, True):
            tiles = TABLE_SINGLE_MEANS[dim] if means and bits == 32 else configs
            dtype = BF16 if bits == 16 else FP32
            for rank, config in enumerate(tiles):
                quick = rank == 0 and bits == 16 and (arch, dim, means) in ((80, 64, False), (90, 128, False))
                # The best one is compiled for a mask whose blocks are larger than its tiles.
                blocks = (128, 128) if rank == 0 else (config.tile_q, config.tile_k)
                yield fwd_entry(arch, dim, dtype, blocks, config, means, quick)
            if bits == 16:
                yield fwd_entry(arch, dim, FP16, (128, 128), tiles[0], means)
            yield fwd_entry(arch, 96 if dim == 128 else 32, dtype, (128, 128), tiles[0], means)
    for (arch, dim, _), configs in CANDIDATES.items():
        for rank, config in enumerate(configs):
            yield fwd_entry(arch, dim, BF16, (128, 128), config, False, (arch, dim, rank) == (90, 128, 1))
        first = {config.variant: config for config in reversed(configs) if config.variant != "loads"}
        for config in first.values():
            yield fwd_entry(arch, 96 if dim == 128 else 32, FP16, (128, 128), config, False)


def fwd_entry(
    arch: int,
    head_dim: int,
    dtype: torch.dtype,
    blocks: tuple[int, int],
    config: Config,
    means: bool,
    quick: bool = False,
) -> Entry:
    """Make the entry of one forward kernel."""
    data = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "mean_k_ptr", "mean_v_ptr")
    types = dict.fromkeys(data, f"*{TYPES[dtype]}") | {"lse_ptr": "*fp32", "dropped_ptr": "*i8", "scale": "fp32"}
    constexprs = constants(head_dim, dtype, *blocks, config, compensate=means)
    read = {"loads": "", "tma": "kv", "warps": "qkv"}[config.variant]
    for name, tile in {"q": config.tile_q, "k": config.tile_k, "v": config.tile_k}.items():
        if name in read:
            types[f"{name}_descriptor"] = f"tensordesc<{TYPES[dtype]}[1, 1, {tile}, {constexprs['PADDED_DIM']}]>"
        else:
            constexprs[f"{name}_descriptor"] = None
    return Entry(
        name=f"sm_{arch}-fwd-{TYPES[dtype]}-{head_dim}-{of_config(config)}{'-means' if means else ''}",
        arch=arch,
        kernel=_block_sparse_fwd_kernel,
        constants=constexprs,
        options=compile_options(config),
        types=types,
        tensor_op=TENSOR_CORES[arch] if config.tile_q >= MIN_WIDE_TILE else "HMMA",
        plain_loops=int(means and constexprs["MEANS_STAGES"] == 1),
        quick=quick,
    )


def of_config(config: Config) -> str:
    """Name a configuration."""
    return f"{config.tile_q}x{config.tile_k}x{config.num_warps}x{config.num_stages}-{config.variant}"


def block_means() -> Iterator[Entry]:
    """Yield the kernel for means of blocks, which multiplies nothing."""
    for arch in TENSOR_CORES:
        for dim, dtype in ((128, BF16), (72, FP32)):
            yield Entry(
                name=f"sm_{arch}-means-{TYPES[dtype]}-{dim}",
                arch=arch,
                kernel=_block_means_kernel,
                constants=means_constants(dim, 128),
                options={},
                types={"x_ptr": f"*{TYPES[dtype]}", "means_ptr": "*fp32"},
                tensor_op=None,
                quick=arch == 80,
            )


KERNELS: tuple[Callable[[], Iterator[Entry]], ...] = (fwd, block_means, *CHOICE, *BACKWARD, *PRECISION, *SLA)


def entries() -> dict[str, Entry]:
    """Return all entries by name."""
    every = [entry for kernel in KERNELS for entry in kernel()]
    named = {entry.name: entry for entry in every}
    assert len(named) == len(every), "two entries have one name"
    return named
