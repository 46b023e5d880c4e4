"""Device checks: helpers run as Triton kernels on NVIDIA GPUs without gradients, and eagerly elsewhere."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

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
    if device.type != "cuda" or available() is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the one that kernels are launched on, as a context.

    Args:
        device: Where the tensors are; the CPU for Triton's interpreter.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def available() -> str | None:
    """Return why this kernel cannot run on this machine, or ``None``."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if _interpreted():
        return None
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs, and this build of torch is for AMD"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
