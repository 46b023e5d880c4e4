"""The CPU kernel beside dense attention, with the machine idle and with other processes busy on some cores.

``python -m benches.busy`` prints the speed-up over dense of the same rounds; what else runs on the machine counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastdit.attention.kernels import block_sparse_attention
from fastdit.bench.kernels import random_blocks, random_tensors
from fastdit.bench.measuring.measure import interleaved
from fastdit.bench.report.result_store import environment
from fastdit.mask import BlockMask

from .problems import problem_of


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep cores busy with processes that do nothing but spin.

    Args:
        processes: How many, at least 0.
    """
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def main(
    tokens: Annotated[int, typer.Option(min=256, help="A multiple of 256.")] = 8192,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    head_dim: Annotated[int, typer.Option(min=16)] = 64,
    density: Annotated[float, typer.Option(min=0.001, max=1.0)] = 0.2,
    block: Annotated[int, typer.Option(min=16, help="Queries and keys in a block.")] = 128,
    dtypes: Annotated[str, typer.Option(help="Of torch, separated by commas.")] = "float32,bfloat16",
    processes: Annotated[int, typer.Option(min=1, help="Busy processes beside this one.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds at least.")] = 5,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for rows of JSON, appended.")] = None,
) -> None:
    """Time dense attention and the CPU kernel in turn, idle and busy, forward alone and with backward.

    Args:
        tokens: A multiple of 256.
        heads: At least 1.
        head_dim: Channels of a head, at least 16.
        density: Fraction of blocks that are listed, in (0, 1].
        block: Queries and keys in a block, at least 16.
        dtypes: Names of torch dtypes, separated by commas.
        processes: Busy processes, at least 1.
        repeats: Rounds at least, 1 or more.
        output: File to which rows of JSON are appended.
    """
    problem = problem_of(tokens, head_dim, heads)
    mask = random_blocks(problem, density, (block, block))
    print(
        f"{tokens} tokens, {heads} heads of {head_dim}, density {mask.density:.2f}, {torch.get_num_threads()} threads"
    )
    for name in dtypes.split(","):
        tensors = random_tensors(problem, getattr(torch, name), "cpu")
        for backward in (False, True):
            runs = _runs(tensors, mask, backward)
            for beside in (0, processes):
                with busy(beside):
                    load = os.getloadavg()[0]
                    times = interleaved(runs, "cpu", repeats=repeats)
                dense, sparse = times["dense"].seconds, times["sparse"].seconds
                row = {
                    "benchmark": "busy",
                    "problem": problem.describe(),
                    "setting": {"dtype": name, "block": block, "backward": backward, "busy": beside},
                    "density": mask.density,
                    "dense_seconds": dense,
                    "seconds": sparse,
                    "speedup": dense / sparse,
                    "repeats": len(times["sparse"].samples),
                    "load": load,
                    "run": environment("cpu", 0),
                }
                passes = "forward + backward" if backward else "forward"
                print(
                    f"{name} {passes}, {beside} busy: dense {dense * 1e3:.0f} ms, sparse {sparse * 1e3:.0f} ms, "
                    f"{row['speedup']:.2f}x (load before: {load:.1f})",
                    flush=True,
                )
                if output is not None:
                    with output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")


def _runs(tensors: tuple[Tensor, ...], mask: BlockMask, backward: bool) -> dict[str, Callable[[], Any]]:
    attention: dict[str, Callable[..., Tensor]] = {
        "dense": scaled_dot_product_attention,
        "sparse": lambda q, k, v: block_sparse_attention(q, k, v, mask, kernel="cpu")[0],
    }
    if not backward:
        return {name: lambda run=run: run(*tensors) for name, run in attention.items()}
    leaves = [x.clone().requires_grad_() for x in tensors]
    grad = torch.ones_like(tensors[0])
    return {name: lambda run=run: torch.autograd.grad(run(*leaves), leaves, grad) for name, run in attention.items()}


if __name__ == "__main__":
    typer.run(main)
