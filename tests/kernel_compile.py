"""Compile the Triton kernels for GPUs that are not there, and read what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from fastdit.attention.kernels.triton_config import Config
from fastdit.attention.kernels.triton_fwd import _block_sparse_fwd_kernel, compile_options, constants
from fastdit.attention.kernels.triton_means import _block_means_kernel, means_constants

SHARED_LIMIT = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
TENSOR_CORES = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTC[A-Z]*MMA", 120: "HMMA"}
MIN_WIDE_TILE = 64  # queries in a tile, below which sm_90 and sm_100 use the instruction of earlier GPUs
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Compiled:
    """What one compiled kernel is made of; ``None`` where the disassembler is missing."""

    registers: int
    spilled: int
    shared_kib: float
    tensor_ops: int | None
    async_copies: int
    serialized: bool


def compile_fwd(
    arch: int,
    head_dim: int,
    dtype: torch.dtype,
    block_q: int,
    block_k: int,
    config: Config,
    *,
    compensate: bool = False,
) -> Compiled:
    """Compile the forward kernel as a launch with aligned, contiguous tensors would."""
    constexprs = constants(head_dim, dtype, block_q, block_k, config, compensate=compensate)
    tensor_op = TENSOR_CORES[arch] if config.tile_q >= MIN_WIDE_TILE else "HMMA"
    kinds = {"lse_ptr": "*fp32", "dropped_ptr": "*i8", "scale": "fp32"}
    return _compile(_block_sparse_fwd_kernel, arch, dtype, constexprs, compile_options(config), kinds, tensor_op)


def compile_means(arch: int, head_dim: int, dtype: torch.dtype, block: int) -> Compiled:
    """Compile the kernel for means, likewise."""
    constexprs = means_constants(head_dim, block)
    return _compile(_block_means_kernel, arch, dtype, constexprs, {}, {"means_ptr": "*fp32"}, "HMMA")


def _compile(
    kernel: triton.JITFunction,
    arch: int,
    dtype: torch.dtype,
    constexprs: dict[str, int | bool | str],
    options: dict[str, int | bool],
    kinds: dict[str, str],
    tensor_op: str,
) -> Compiled:
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in kinds:
            signature[name] = kinds[name]
        elif re.fullmatch(r"(q|k|v|x|out|mean_[kv])_ptr", name):
            signature[name] = f"*{_NAMES[dtype]}"
        else:
            signature[name] = "*i32" if name.endswith("_ptr") else "i32"
        if name.endswith("_ptr") or re.fullmatch(r"stride_[qkvox][bhs]", name):
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constexprs.items()},
        attrs=aligned,
    )
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _inspect(built.asm["ptx"], built.asm["cubin"], built.metadata.shared, arch, tensor_op)


def _inspect(ptx: str, cubin: bytes, shared: int, arch: int, tensor_op: str) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        binary, text = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        binary.write_bytes(cubin)
        text.write_text(ptx)
        target = re.search(r"\.target\s+(\w+)", ptx)[1]
        log = _output(get_ptxas(arch).path, "-v", f"--gpu-name={target}", text, "-o", Path(folder, "again.cubin"))
        disassembler = _tool("nvdisasm")
        code = _output(disassembler, "-c", binary) if disassembler else None
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    if code is None:
        copies = len(re.findall(r"cp\.async\.(?:cg|ca|bulk)", ptx))
        return Compiled(registers, spilled, shared / 1024, None, copies, "serialized" in log)
    spilled += len(re.findall(r"\b(?:LDL|STL)\b", code))
    tensor_ops = len(re.findall(rf"\b{tensor_op}\b", code))
    copies = len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", code))
    return Compiled(registers, spilled, shared / 1024, tensor_ops, copies, "serialized" in log)


@cache
def _tool(name: str) -> Path | None:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return path if path.exists() else None


def _output(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
