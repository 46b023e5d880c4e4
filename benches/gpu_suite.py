"""What a GPU has to say about the kernels, in one unattended run: whether they are right, then how fast they are.

``python -m benches.gpu_suite --minutes 9 --out DIR`` writes a row of JSON after each measurement, most important first;
started again with the same folder it goes on where it was stopped. Without a GPU ``--dry-run`` lists what would run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from fastdit.attention import MethodState, get_method
from fastdit.attention.kernels import block_sparse_attention, fa4, list_precisions
from fastdit.attention.kernels.options import VARIANTS, Options
from fastdit.attention.kernels.triton import kernel as triton_attention
from fastdit.attention.kernels.triton.tiles import CANDIDATES, TABLE, Config, table_arch
from fastdit.bench.jobs import Job, Outcome, run_job
from fastdit.bench.kernels import kernel_jobs, random_blocks, random_tensors
from fastdit.bench.measuring.contenders import Contender, Run, Unavailable, contenders, failure, prepare
from fastdit.bench.measuring.verify import fault, poisoned_empty
from fastdit.bench.report.result_store import Store, environment
from fastdit.mask import BlockMask
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

from .gpu_sla import sla_check_job, sla_job
from .gpu_times import times_of
from .problems import Problem, problem_of

BLOCKS = (128, 128)
DENSITIES = (0.2, 0.1, 0.05, 1.0)  # the last is our own dense attention
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
METHODS = ("draft", "adaspa", "sla")
LOW = tuple(f"-{precision}" for precision in list_precisions())


def suite(device: str, *, tiny: bool = False) -> list[Job]:
    """List all jobs, most important first.

    Args:
        device: Where they run.
        tiny: Whether sizes are those of a trial of this script: their times say nothing.
    """
    heads, sizes, dims = (1, (512,), (64,)) if tiny else (24, (32768, 65536, 16384, 8192), (128, 64))
    dtypes, repeats = (DTYPES[:2], 1) if tiny else (DTYPES, 20)
    problems = [problem_of(tokens, dim, heads) for tokens in sizes for dim in dims]
    known = [c for c in contenders() if c.name not in ("sdpa-math", "fastdit-cpu") and not (tiny and "flex" in c.name)]
    timed = partial(kernel_jobs, blocks=BLOCKS, device=device, dtype=torch.bfloat16, repeats=repeats)

    jobs = [check_job(dim, dtype, device, tiny=tiny) for dtype in dtypes for dim in ((64,) if tiny else (128, 64, 96))]
    plain = [c for c in known if not c.name.endswith(LOW)]
    jobs += _titled("forward", timed(problems[:4], plain, densities=DENSITIES))
    jobs += [
        job
        for problem in problems[:2]
        for job in _titled("variants", timed([problem], of_settings(problem.head_dim, device), densities=(0.1, 1.0)))
    ]
    low = [c for c in known if c.name.endswith(LOW) or c.name in ("fastdit-triton", "sdpa-cudnn", "sdpa-flash")]
    jobs += _titled("low precision", timed(problems[:2], low, densities=(0.2, 1.0)))
    jobs += _titled("orders", timed(problems[:2], of_orders(), densities=(0.1,)))
    jobs += [method_job(problem, device, repeats) for problem in problems[:2]]
    jobs += [sla_check_job(dim, dtype, device) for dtype in dtypes[tiny:] for dim in ((16,) if tiny else (128, 64, 72))]
    jobs += [sla_job(problem, density, device, repeats) for problem in problems[:2] for density in (0.05, 0.1)]
    jobs += [backward_job(problem, density, device, repeats) for problem in problems[:2] for density in (0.2, 0.1)]
    jobs += _titled("forward", timed(problems[4:], plain, densities=DENSITIES))
    return jobs


def check_job(head_dim: int, dtype: torch.dtype, device: str, *, tiny: bool = False) -> Job:
    """Compare compiled kernels with fp64 over ragged blocks, every variant and precision, in poisoned memory.

    Args:
        head_dim: Channels of a head.
        dtype: Of queries, keys and values.
        device: Where they run.
        tiny: Whether there are few tokens.
    """
    parts: dict[str, dict[str, Any]] = {f"{variant}": {"variant": variant} for variant in VARIANTS}
    parts["mean"] = {"compensate": "mean"}
    parts |= {precision: {"precision": precision} for precision in list_precisions()}
    parts |= {f"{precision} gathered": {"precision": precision} for precision in list_precisions()}
    parts["fa4"] = {"kernel": "fa4"}
    grid = VideoGrid(3, 7, 11) if tiny else VideoGrid(5, 27, 31)
    problem = Problem("odd", 1, 2, head_dim, TokenSpec(grid))

    def run(todo: Collection[str], advance: Callable[[], None]) -> Outcome:
        outcome = Outcome()
        q, k, v = random_tensors(problem, dtype, device)
        mask = random_blocks(problem, 0.3, BLOCKS).to(device)
        for part in todo:
            reason = _refusal(q, k, v, mask, **parts[part])
            if reason is not None:
                outcome.absent[part] = reason
                continue
            try:
                with poisoned_empty(), torch.no_grad():
                    if part.endswith("gathered"):
                        out = _in_order(parts[part]["precision"], "gathered", q, k, v, mask)()
                    else:
                        out, _ = block_sparse_attention(q, k, v, mask, **{"kernel": "triton", **parts[part]})
            except Exception as error:  # noqa: BLE001 - whatever a compiler raises, the next part is tried
                outcome.faults[part] = failure(error)
                continue
            if part == "mean":
                exact, _ = block_sparse_attention(
                    q.double(), k.double(), v.double(), mask, kernel="reference", compensate="mean"
                )
                error = float((out.double() - exact).abs().max())
                wrong = None if error <= 16 * torch.finfo(dtype).eps else f"error {error:.3g}"
            else:
                wrong = fault(out, q, k, v, mask, exact="precision" not in parts[part])
            if wrong is None:
                outcome.rows[part] = {"right": True}
            else:
                outcome.faults[part] = wrong
            advance()
        return outcome

    return Job("check", f"{str(dtype).removeprefix('torch.')} {head_dim}", tuple(parts), run)


def of_settings(head_dim: int, device: str) -> list[Contender]:
    """Make a contender of each setting of the forward kernel that a table may choose, with dense ones beside them.

    Args:
        head_dim: 64 or 128.
        device: Where they run.
    """
    capability = torch.cuda.get_device_capability(device) if device.startswith("cuda") else (9, 0)
    key = (table_arch(capability), head_dim, 16)
    known = [c for c in (*TABLE[key], *CANDIDATES.get(key, ())) if c.tile_q >= 64]
    ours = [
        Contender(
            f"{c.tile_q}x{c.tile_k}x{c.num_warps}x{c.num_stages}-{c.variant}",
            True,
            partial(_with_setting, c),
            ours=True,
        )
        for c in known
    ]
    return [c for c in contenders() if c.name in ("sdpa-cudnn", "sdpa-flash", "fa3", "fa4", "fastdit-fa4")] + ours


def _with_setting(config: Config, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Run:
    from fastdit.attention.kernels.triton.forward import block_sparse_fwd

    reason = _refusal(q, k, v, mask, variant=config.variant)
    if reason is not None:
        raise Unavailable(reason)
    options = Options(q.shape[-1] ** -0.5)
    return lambda: block_sparse_fwd(q, k, v, mask, options, config)[0]


def of_orders() -> list[Contender]:
    """Make contenders for tokens in another order: for each low precision, laid out first or gathered by the kernel."""
    ways = [(precision, way) for precision in list_precisions() for way in ("laid out", "gathered")]
    return [Contender(" ".join(way), True, partial(_in_order, *way), exact=False, ours=True) for way in ways]


def _in_order(precision: str, way: str, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Run:
    from fastdit.attention.kernels.triton.layout import triton_lay_out

    if (reason := _refusal(q, k, v, mask, precision=precision)) is not None:
        raise Unavailable(reason)
    runs = torch.arange(q.shape[2], device=q.device).split(8)
    index = torch.cat([runs[i] for i in torch.randperm(len(runs), generator=torch.Generator().manual_seed(0))])
    # In memory as models have them: all heads of a token together.
    tensors = [x[:, :, index.argsort()].transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    attend = partial(block_sparse_attention, mask=mask, kernel="triton", precision=precision)
    if way == "gathered":
        return lambda: attend(*tensors, index=index[None])[0]
    return lambda: attend(*triton_lay_out(index[None], *tensors))[0]


def _refusal(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, kernel: str = "triton", **how: str) -> str | None:
    """Ask a kernel why it cannot run a call; what it does not refuse it has to run."""
    module = {"triton": triton_attention, "fa4": fa4}[kernel]
    options = Options(q.shape[-1] ** -0.5, how.get("compensate"), how.get("precision"), how.get("variant"))
    return module.available() or module.check(q, k, v, mask, options)


def method_job(problem: Problem, device: str, repeats: int) -> Job:
    """Time the choice of blocks beside the whole attention of a method, at density 0.1, and dense attention.

    Args:
        problem: The problem.
        device: Where it runs.
        repeats: Rounds at least.
    """

    @torch.no_grad()
    def run(todo: Collection[str], advance: Callable[[], None]) -> Outcome:
        q, k, v = random_tensors(problem, torch.bfloat16, device)
        call = AttentionCall(problem.tokens)
        runs: dict[str, Callable[[], Any]] = {"dense": lambda: F.scaled_dot_product_attention(q, k, v)}
        for name in METHODS:
            method = get_method(name, density=0.1)
            runs[f"{name} choice"] = partial(lambda m: m.pattern(q, k, call, MethodState()), method)
            runs[f"{name} whole"] = partial(lambda m: m.forward(q, k, v, call, MethodState()), method)
        return times_of({part: runs[part] for part in todo}, device, repeats, advance)

    parts = ("dense", *(f"{name} {what}" for name in METHODS for what in ("choice", "whole")))
    return Job("methods", problem.name, parts, run, about={"problem": problem.describe()})


def backward_job(problem: Problem, density: float, device: str, repeats: int) -> Job:
    """Time the forward and backward pass over listed blocks beside dense ones.

    Args:
        problem: The problem.
        density: Fraction of the blocks that is listed, in (0, 1].
        device: Where it runs.
        repeats: Rounds at least.
    """

    def run(todo: Collection[str], advance: Callable[[], None]) -> Outcome:
        tensors = [x.requires_grad_() for x in random_tensors(problem, torch.bfloat16, device)]
        mask = random_blocks(problem, density, BLOCKS).to(device)
        known = {c.name: c for c in contenders()}
        outcome, runs = Outcome(), {}
        for part in todo:
            try:
                forward, out = prepare(known[part], *tensors, mask)
                grad = torch.randn_like(out)
                torch.autograd.grad(out, tensors, grad)
            except Unavailable as error:
                outcome.absent[part] = str(error)
                continue
            except Exception as error:  # noqa: BLE001 - whatever a compiler raises, the next part is tried
                (outcome.faults if known[part].ours else outcome.absent)[part] = failure(error)
                continue
            runs[part] = partial(lambda f, g: torch.autograd.grad(f(), tensors, g), forward, grad)
        timed = times_of(runs, device, repeats, advance)
        return Outcome(timed.rows, outcome.absent, outcome.faults | timed.faults)

    parts = ("sdpa-cudnn", "sdpa-flash", "fa3", "fa4", "flex", "fastdit-fa4", "fastdit-triton")
    return Job("backward", f"{problem.name} @{density:g}", parts, run, about={"problem": problem.describe()})


def _titled(benchmark: str, jobs: list[Job]) -> list[Job]:
    return [replace(job, benchmark=benchmark) for job in jobs]


def main(
    out: Annotated[Path, typer.Option(help="Folder for the rows; what it holds already is not measured again.")],
    minutes: Annotated[float, typer.Option(help="No job is begun after this time.", min=0)] = 9,
    device: Annotated[str, typer.Option(help="Where it runs.")] = "cuda",
    tiny: Annotated[bool, typer.Option(help="Tiny sizes, to try this script.")] = False,
    dry_run: Annotated[bool, typer.Option(help="List what would run.")] = False,
) -> None:
    """Check and time the kernels on a GPU.

    Args:
        out: Folder for the rows.
        minutes: After which no job is begun, at least 0.
        device: Where it runs.
        tiny: Whether sizes are those of a trial of this script.
        dry_run: Whether to list what would run, and stop.

    Raises:
        Exit: With 1 if a result was wrong, with 2 if there is no GPU.
    """
    end = time.monotonic() + 60 * minutes
    if dry_run:
        for job in suite("cpu" if not torch.cuda.is_available() else device, tiny=tiny):
            print(f"{job.benchmark:14} {job.name}: {', '.join(job.parts)}")
        return
    if device.startswith("cuda") and not torch.cuda.is_available():
        print("torch finds no CUDA device; --dry-run lists what would run on one", file=sys.stderr)
        raise typer.Exit(2)
    store, about, wrong, left = Store(out / "gpu.jsonl"), environment(device, 0), {}, []
    for job in suite(device, tiny=tiny):
        if time.monotonic() > end:
            left.append(f"{job.benchmark} {job.name}")
            continue
        begun = time.monotonic()
        try:
            faults = run_job(job, store, about)
        except Exception as error:  # noqa: BLE001 - what goes wrong in one job must not cost the others
            faults = {job.name: failure(error)}
        wrong |= faults
        print(
            f"{job.benchmark:14} {job.name}: {time.monotonic() - begun:.0f} s{''.join(f', WRONG {f}' for f in faults)}"
        )
        sys.stdout.flush()
    for part, reason in wrong.items():
        print(f"wrong: {part}: {reason}", file=sys.stderr)
    print(f"rows are in {store.path}; {len(left)} jobs left{': ' if left else ''}{'; '.join(left)}")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
