"""The kernels of linear attention with every setting that the table can choose, for the compile gate."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
import triton
from kernel_compile import TENSOR_CORES, TYPES, Entry

from fastdit.attention.kernels.triton.linear.states import (
    _states_kernel,
    _sums_kernel,
    sums_constants,
    sums_options,
    token_constants,
    token_options,
)
from fastdit.attention.kernels.triton.linear.tiles import TABLE, SlaConfig
from fastdit.attention.kernels.triton.linear.tokens import _gradients_kernel, _output_kernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = ("states", "weighted-states", "output", "projected", "mixed", "dq", "dkdv")
PROJECTION = ("weight_ptr", "bias_ptr")
MIN_WIDE_TILE = 64  # rows of a product, below which sm_90 and sm_100 use the instruction of earlier GPUs


def sla() -> Iterator[Entry]:
    """Yield all kernels with softmax, the best tables of fp16 and odd head dims, and learned features."""
    for (arch, dim, bits), config in TABLE.items():
        dtype = FP32 if bits == 32 else BF16
        quick = (arch, dim, bits) in ((90, 128, 16), (80, 64, 16))
        yield from of_tokens(arch, dim, dim, dtype, "softmax", config, quick=quick)
        yield from of_tokens(arch, 2 * dim, dim, dtype, "given", config, ("states", "projected", "dkdv"))
        yield of_sums(arch, dim, dtype, config)
        odd = 96 if dim == 128 else 32
        if bits == 16:
            yield from of_tokens(arch, dim, dim, FP16, "elu", config, ("weighted-states", "projected", "dq", "dkdv"))
            yield from of_tokens(arch, odd, odd, dtype, "relu", config, ("output", "projected", "dq"))


def of_tokens(
    arch: int,
    features: int,
    head_dim: int,
    dtype: torch.dtype,
    feature_map: str,
    config: SlaConfig,
    kinds: Collection[str] = KINDS,
    *,
    quick: bool = False,
) -> Iterator[Entry]:
    """Yield the kernels that read tokens."""
    kernels = [
        ("states", _states_kernel, config.states, {"WEIGHTED": False}),
        ("weighted-states", _states_kernel, config.states, {"WEIGHTED": True}),
        ("output", _output_kernel, config.output, dict.fromkeys(("exact_ptr", "shares_ptr", *PROJECTION))),
        ("projected", _output_kernel, config.output, {}),
        ("mixed", _output_kernel, config.output, dict.fromkeys(PROJECTION)),
        ("dq", _gradients_kernel, config.gradients, {"OF_QUERIES": True}),
        ("dkdv", _gradients_kernel, config.gradients, {"OF_QUERIES": False}),
    ]
    for kind, kernel, settings, more in kernels:
        if kind not in kinds:
            continue
        constants = token_constants(features, head_dim, dtype, 256, feature_map, settings)
        rows = constants["PADDED_DIM" if kernel is _states_kernel else "TILE"]
        unrolled = kernel is not _states_kernel and constants["PADDED_FEATURES"] <= 2 * constants["CHUNK"]
        yield Entry(
            name=f"sm_{arch}-sla-{kind}-{TYPES[dtype]}-{features}x{head_dim}-{feature_map}",
            arch=arch,
            kernel=kernel,
            constants={**constants, **more},
            options=token_options(settings),
            types=_types(kernel, dtype, more),
            tensor_op=None if unrolled else TENSOR_CORES[arch] if rows >= MIN_WIDE_TILE else "HMMA",
            quick=quick,
        )


def of_sums(arch: int, dim: int, dtype: torch.dtype, config: SlaConfig) -> Entry:
    """Make the entry of the kernel that sums states over blocks."""
    return Entry(
        name=f"sm_{arch}-sla-sums-{TYPES[dtype]}-{dim}",
        arch=arch,
        kernel=_sums_kernel,
        constants=sums_constants(dim, dim, dtype, config),
        options=sums_options(config),
        types=dict.fromkeys(("map_ptr", "states_ptr", "sums_ptr"), "*bf16"),
        tensor_op=TENSOR_CORES[arch],
    )


def _types(kernel: triton.JITFunction, dtype: torch.dtype, constants: Collection[str]) -> dict[str, str]:
    data = ("x_ptr", "y_ptr", "out_ptr", "dx_ptr", "dy_ptr", "exact_ptr", *PROJECTION)
    types = dict.fromkeys(data, f"*{TYPES[dtype]}")
    types |= {"weights_ptr": "*fp32", "states_ptr": "*bf16", "sums_ptr": "*bf16"}
    # The blocks that a projection is joined to are marked, a mix has shares.
    types["shares_ptr"] = f"*{TYPES[dtype]}" if "weight_ptr" in constants else "*i1"
    return {name: kind for name, kind in types.items() if name in kernel.arg_names and name not in constants}


SLA = (sla,)
