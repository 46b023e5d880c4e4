"""Training in several processes (``torchrun``): each takes its own batch, gradients are averaged.

On a CPU, processes of one thread each are faster than one process of many for models this small.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn


def start_processes() -> tuple[int, int]:
    """Join the other processes if ``torchrun`` started several; return rank and their number."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    return (dist.get_rank(), count) if count > 1 else (0, 1)


def average_gradients(model: nn.Module, processes: int) -> None:
    """Replace every gradient by its mean over the processes."""
    if processes == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    flat /= processes
    offset = 0
    for grad in grads:
        grad.copy_(flat[offset : offset + grad.numel()].view_as(grad))
        offset += grad.numel()
