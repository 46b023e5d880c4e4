"""The part of the unattended GPU run that is about SLA: its linear part and the join, checked and timed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.attention import MethodState, get_method
from fastdit.attention.methods.sla.linear import join_linear_attention, linear_attention
from fastdit.bench.jobs import Job, Outcome
from fastdit.bench.kernels import random_tensors
from fastdit.bench.measuring.contenders import failure
from fastdit.bench.measuring.verify import poisoned_empty
from fastdit.tokens import AttentionCall

from .gpu_times import times_of
from .problems import Problem, problem_of


def sla_check_job(head_dim: int, dtype: torch.dtype, device: str) -> Job:
    """Compare linear attention in Triton, its gradients, and its join, with eager code in fp64, in poisoned memory.

    Args:
        head_dim: Channels of a head.
        dtype: Of queries, keys and values.
        device: Where it runs.
    """
    parts = {**dict.fromkeys(("softmax", "elu", "relu", "given"), True), "softmax over all": False}
    parts |= {f"{features} {join}": True for features in ("softmax", "given") for join in ("projected", "mixed")}

    def run(todo: Collection[str], advance: Callable[[], None]) -> Outcome:
        outcome = Outcome()
        problem = problem_of(256, head_dim, 2)
        tensors = [x[:, :, :231].abs().softmax(-1) + x[:, :, :231] for x in random_tensors(problem, dtype, device)]
        blocks = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
        lengths = torch.tensor([32] * 6 + [0, 7], dtype=torch.int32, device=device).view(1, 1, -1)

        def results(part: str, kernel: str, tensors: list[Tensor]) -> list[Tensor]:
            features, covered = part.split()[0], blocks.to(device) if parts[part] else None
            inputs = [x.abs() if features == "given" and i < 2 else x for i, x in enumerate(tensors)]
            if part.endswith(("projected", "mixed")):
                return [joined(part.endswith("projected"), kernel, *inputs, covered, lengths, 32, features)]
            inputs = [x.detach().requires_grad_() for x in inputs]
            out = linear_attention(*inputs, covered, lengths, 32, features, kernel)
            return [out, *torch.autograd.grad(out, inputs, torch.linspace(-1, 1, out.numel()).to(out).view_as(out))]

        for part in todo:
            try:
                with poisoned_empty():
                    found = results(part, "triton", tensors)
            except Exception as error:  # noqa: BLE001 - whatever a compiler raises, the next part is tried
                outcome.faults[part] = failure(error)
                continue
            exact, eager = (results(part, "eager", [x.to(t) for x in tensors]) for t in (torch.float64, dtype))
            for name, x, y, z in zip(("out", "dq", "dk", "dv")[: len(found)], found, exact, eager, strict=True):
                error, budget = (
                    (x - y).abs().max(),
                    2 * (z - y).abs().max() + 8 * torch.finfo(dtype).eps * y.abs().max(),
                )
                if not error <= budget:
                    outcome.faults[part] = f"{name}: error {error:.3g}, budget {budget:.3g}"
            if part not in outcome.faults:
                outcome.rows[part] = {"right": True}
            advance()
        return outcome

    return Job("sla check", f"{str(dtype).removeprefix('torch.')} {head_dim}", tuple(parts), run)


def joined(projected: bool, kernel: str, q: Tensor, k: Tensor, v: Tensor, *listed: Any) -> Tensor:
    """Join linear attention to some other output, in Triton at once or in eager code after it.

    Args:
        projected: Whether it is projected and added; else it is mixed in.
        kernel: ``"triton"`` or ``"eager"``.
        q: ``(1, H, S, D)`` queries or features.
        k: ``(1, H, S, D)`` keys or features.
        v: ``(1, H, S, D)`` values.
        *listed: The blocks, their lengths, tokens per block, and the features, as ``linear_attention`` takes them.

    Returns:
        ``(1, H, S, D)``.
    """
    heads, num, dim, block = v.shape[1], listed[1].shape[-1], v.shape[3], listed[2]
    exact, share = v.flip(2), torch.linspace(0, 0.5, heads * num).to(v).view(1, heads, num)
    weight, bias = (q[0, 0, :dim] / dim**0.5, k[0, 0, 0]) if projected else (None, None)
    if kernel == "triton":
        return join_linear_attention(exact, share, weight, bias, q, k, v, *listed)
    linear = linear_attention(q, k, v, *listed, kernel)
    added = linear - exact if weight is None else F.linear(linear, weight, bias)
    return exact + share.repeat_interleave(block, -1)[..., : v.shape[2], None] * added


def sla_job(problem: Problem, density: float, device: str, repeats: int) -> Job:
    """Time SLA's exact part, both parts, and both with their backward, beside dense attention; without the choice.

    Args:
        problem: The problem.
        density: Fraction of the blocks that is critical, in (0, 1].
        device: Where it runs.
        repeats: Rounds at least.
    """
    variants = ("full", "paper")

    def run(todo: Collection[str], advance: Callable[[], None]) -> Outcome:
        q, k, v = tensors = [x.requires_grad_() for x in random_tensors(problem, torch.bfloat16, device)]
        call, grad = AttentionCall(problem.tokens), torch.randn_like(q)
        runs: dict[str, Callable[[], Any]] = {"dense": torch.no_grad()(lambda: F.scaled_dot_product_attention(q, k, v))}
        runs["dense training"] = lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), tensors, grad)
        for variant in variants:
            method = get_method("sla", variant=variant, density=density)
            weights = method.make_weights(problem.heads, problem.head_dim).to(device)
            for name, state in (("exact", MethodState()), ("whole", MethodState(weights=weights))):
                method.resolve(q, k, call, state)
                state.refresh = False
                forward = partial(method.forward, q, k, v, call, state)
                runs[f"{variant} {name}"] = torch.no_grad()(forward)
                runs[f"{variant} {name} training"] = partial(lambda f: torch.autograd.grad(f(), tensors, grad), forward)
        return times_of({part: runs[part] for part in todo}, device, repeats, advance)

    parts = [
        f"{of}{end}"
        for of in ("dense", *(f"{v} {n}" for v in variants for n in ("exact", "whole")))
        for end in ("", " training")
    ]
    return Job("sla", f"{problem.name} @{density:g}", tuple(parts), run, about={"problem": problem.describe()})
