"""Which helpers run as Triton kernels: those on an NVIDIA GPU without a gradient. All others are eager."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def takes_triton(*tensors: Tensor) -> bool:
    """Say whether Triton kernels can read some tensors.

    Args:
        *tensors: ``(B, H, S, D)``.
    """
    return all(
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and x.stride(-1) == 1
        and not (x.requires_grad and torch.is_grad_enabled())
        for x in tensors
    ) and has_triton(tensors[0].device)


def has_triton(device: torch.device) -> bool:
    """Say whether Triton kernels run on a device.

    Args:
        device: The device.
    """
    from . import triton_attention

    if device.type != "cuda" or triton_attention.available() is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the one that kernels are launched on, as a context.

    Args:
        device: Where the tensors are; the CPU for Triton's interpreter.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
