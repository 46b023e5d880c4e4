"""Compile the Triton kernels for GPUs that are not there, and read what came out. ``kernel_entries.py`` says which."""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
TENSOR_CORES = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTC[A-Z]*MMA", 120: "HMMA"}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "i8"}
LOOP = re.compile(r"\bscf\.(?:for|while)\b")
PRODUCT = re.compile(r"\btt\.dot\b|\bttng\.(?:warp_group_dot|tc_gen5_mma)\b")
ASYNC_COPY = re.compile(r"\bttg\.async_copy_global_to_local\b|\bttng\.async_tma_\w+")


@dataclass(frozen=True)
class Entry:
    """One kernel with the settings of one launch, and what its code has to hold.

    Args:
        name: ``sm_90-...``, unlike any other.
        arch: Compute capability, 80 for 8.0.
        kernel: The ``@triton.jit`` function.
        constants: Compile-time arguments, as the launch passes them.
        options: How it is compiled, as the launch passes it.
        types: Triton's types of the arguments that are no 32-bit integers, or pointers to them.
        tensor_op: A pattern of the instruction that multiplies, or ``None`` where nothing is multiplied.
        plain_loops: Loops that multiply and read without asynchronous copies, on purpose.
        quick: Whether it is compiled by `make test-fast` too.
    """

    name: str
    arch: int
    kernel: triton.JITFunction
    constants: Mapping[str, int | bool | str]
    options: Mapping[str, int | bool]
    types: Mapping[str, str]
    tensor_op: str | None
    plain_loops: int = 0
    quick: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Compiled:
    """What one compiled kernel is made of."""

    registers: int
    spilled: int
    serialized: bool
    shared_kib: float
    tensor_ops: int
    loops: int
    plain_loops: int


def compile_entry(entry: Entry) -> Compiled:
    """Compile as a launch with aligned tensors would."""
    built, log = _build(entry)
    code = _disassemble(built.asm["cubin"])
    # The assembler's own count leaves out what is saved around calls.
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log))) + len(re.findall(r"\b(?:LDL|STL)\b", code))
    loops, plain = product_loops(built.asm["ttgir"])
    return Compiled(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spilled=spilled,
        serialized="serialized" in log,
        shared_kib=built.metadata.shared / 1024,
        tensor_ops=len(re.findall(rf"\b{entry.tensor_op}\b", code)),
        loops=loops,
        plain_loops=plain,
    )


def faults(entry: Entry, built: Compiled) -> list[str]:
    """List what is wrong with a compiled kernel."""
    limit = SHARED_LIMIT[entry.arch]
    checks = {
        f"{built.spilled} bytes or instructions of spills": built.spilled > 0,
        "products that wait for each other (wgmma serialized)": built.serialized,
        f"{built.shared_kib:.1f} KiB of shared memory, {limit} is the limit": built.shared_kib > limit,
        f"no {entry.tensor_op}": entry.tensor_op is not None and not built.tensor_ops,
        "no loop that multiplies": entry.tensor_op is not None and not built.loops,
        f"{built.plain_loops} of {built.loops} loops read without asynchronous copies, {entry.plain_loops} may": (
            built.plain_loops > entry.plain_loops
        ),
    }
    return [text for text, wrong in checks.items() if wrong]


def product_loops(ir: str) -> tuple[int, int]:
    """Count innermost loops of Triton's GPU dialect that multiply, and those among them that nothing is prefetched for.

    With warps that are specialised, copies are made by a loop of other warps: there the loops are counted alone.
    """
    bodies = _innermost_loops(ir)
    products = [body for body in bodies if PRODUCT.search(body)]
    copies = [body for body in bodies if ASYNC_COPY.search(body)]
    if "ttg.warp_specialize(" in ir:
        return len(products), 0 if copies else len(products)
    return len(products), sum(body not in copies for body in products)


def _innermost_loops(ir: str) -> list[str]:
    lines, bodies = ir.splitlines(), []
    for start, line in enumerate(lines):
        if not LOOP.search(line):
            continue
        body = []
        for inner in lines[start + 1 :]:
            if _indent(inner) <= _indent(line):
                break
            body.append(inner)
        text = "\n".join(body)
        if not LOOP.search(text):
            bodies.append(text)
    return bodies


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _build(entry: Entry) -> tuple[Any, str]:
    names, signature, aligned = entry.kernel.arg_names, {}, {}
    unknown = (entry.types.keys() | entry.constants.keys()) - set(names)
    assert not unknown, f"{entry.name}: {entry.kernel.__name__} has no arguments {unknown}"
    for position, name in enumerate(names):
        if name in entry.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = entry.types.get(name, "*i32" if name.endswith("_ptr") else "i32")
        if name.endswith("_ptr") or re.fullmatch(r"stride_[a-z]*[qkvox][bhs]", name):
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=entry.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in entry.constants.items()},
        attrs=aligned,
    )
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), redirect_stdout(log):
        # The assembler's log is not kept with what it made.
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        built = triton.compile(source, target=GPUTarget("cuda", entry.arch, 32), options=dict(entry.options))
    return built, log.getvalue()


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # Without its analysis of jumps, which no check reads, it takes two thirds of the time.
        command = [_disassembler(), "--print-code", "--no-dataflow", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


@cache
def _disassembler() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm")
