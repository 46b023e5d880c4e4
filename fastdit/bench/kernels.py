"""Kernel benchmark: our kernels and all installed ones on the same blocks, each verified first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from ..mask import BlockMask
from .inputs.problems import Problem
from .jobs import Job, Outcome
from .measuring.contenders import Broken, Contender, Run, Unavailable, prepare
from .measuring.measure import extra_memory, interleaved
from .measuring.verify import fault


def kernel_jobs(
    problems: Sequence[Problem],
    known: Sequence[Contender],
    *,
    densities: Sequence[float],
    blocks: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    repeats: int = 5,
    throughput: float | None = None,
) -> list[Job]:
    """Make a job for each problem: all contenders in turn, sparse ones at each density.

    Args:
        problems: The problems.
        known: The contenders.
        densities: Fractions of the blocks that are listed, each in (0, 1].
        blocks: Queries and keys in a block.
        dtype: Dtype of queries, keys and values.
        device: Device to run on.
        seed: Random seed.
        repeats: Minimum number of rounds.
        throughput: Floating point operations a second of dense attention here, for the estimate; ``None``: no estimate.
    """
    jobs = []
    for problem in problems:
        parts = {c.name: (c, 1.0) for c in known if not c.sparse}
        parts |= {f"{c.name}@{d:g}": (c, d) for c in known if c.sparse for d in densities}
        rounds = (2 + repeats) * problem.flops / throughput if throughput else None
        about = {
            "problem": problem.describe(),
            "setting": {"dtype": str(dtype).removeprefix("torch."), "blocks": list(blocks), "repeats": repeats},
        }
        job = partial(_measure, problem, parts, blocks, dtype, device, seed, repeats)
        name = f"{problem.name} {about['setting']['dtype']} {blocks[0]}x{blocks[1]}"
        # absent contenders take no time; typically about two dense ones are installed
        seconds = rounds * (2 + sum(densities) * sum(c.name.startswith("fastdit") for c in known)) if rounds else None
        jobs.append(Job("kernels", name, tuple(parts), job, seconds, about, len(parts) + repeats))
    return jobs


def random_blocks(problem: Problem, density: float, blocks: tuple[int, int], seed: int = 0) -> BlockMask:
    """Draw blocks as a method would list them: as many in every row, others in every head, its own always.

    Args:
        problem: The problem.
        density: Fraction of the blocks of a row, in (0, 1].
        blocks: Queries and keys in a block.
        seed: Random seed.
    """
    tokens = problem.tokens.num_tokens
    num_q, num_k = (-(-tokens // block) for block in blocks)
    scores = torch.rand(1, problem.heads, num_q, num_k, generator=torch.Generator().manual_seed(seed))
    own = torch.arange(num_q) * num_k // num_q
    scores[:, :, torch.arange(num_q), own] = 2.0
    count = max(1, round(density * num_k))
    listed = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count, dim=-1).indices, True)
    return BlockMask.from_dense(listed, block_q=blocks[0], block_k=blocks[1], tokens_q=tokens, tokens_k=tokens)


def random_tensors(problem: Problem, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries, keys and values: ``(1, H, S, D)`` each.

    Args:
        problem: The problem.
        dtype: Dtype of the tensors.
        device: Their device.
        seed: Random seed.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = (1, problem.heads, problem.tokens.num_tokens, problem.head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    return q, k, v


@torch.no_grad()
def _measure(
    problem: Problem,
    parts: dict[str, tuple[Contender, float]],
    blocks: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    seed: int,
    repeats: int,
    todo: Collection[str],
    advance: Callable[[], None],
) -> Outcome:
    q, k, v = random_tensors(problem, dtype, device, seed)
    masks = {density: random_blocks(problem, density, blocks, seed).to(device) for _, density in parts.values()}
    outcome, runs, memory = Outcome(), {}, {}
    for part, (contender, density) in parts.items():
        # dense contenders run again even where only sparse ones are missing: ratios are of one run
        if part in todo or not contender.sparse:
            made = _checked(contender, q, k, v, masks[density], outcome, part, seed)
            if made is not None:
                runs[part] = made
                memory[part] = extra_memory(made, device)
        advance()
    if runs.keys().isdisjoint(todo):
        return outcome
    times = interleaved(runs, device, repeats=repeats, advance=advance)
    dense = {part: times[part].seconds for part in times if not parts[part][0].sparse}
    best = min(dense, key=dense.__getitem__, default=None)
    for part, taken in times.items():
        contender, _ = parts[part]
        density = masks[parts[part][1]].density if contender.sparse else 1.0
        outcome.rows[part] = {
            "contender": contender.name,
            "package": contender.package and f"{contender.package} {contender.version}",
            "density": density,
            "seconds": taken.seconds,
            "seconds_spread": taken.spread,
            "repeats": len(taken.samples),
            "tflops": problem.flops * density / taken.seconds / 1e12,
            "dense": best,
            "dense_seconds": dense[best] if best else None,
            "speedup": dense[best] / taken.seconds if best else None,
            "ideal": density * dense[best] / taken.seconds if best else None,
            "extra_bytes": memory[part],
        }
    return outcome


def _checked(
    contender: Contender, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, outcome: Outcome, part: str, seed: int
) -> Run | None:
    try:
        run, out = prepare(contender, q, k, v, mask)
    except Unavailable as error:
        outcome.absent[part] = str(error)
        return None
    except Broken as error:
        outcome.faults[part] = str(error)
        return None
    wrong = fault(out, q, k, v, mask if contender.sparse else None, exact=contender.exact, seed=seed)
    if wrong is not None:
        outcome.faults[part] = wrong
        return None
    return run
