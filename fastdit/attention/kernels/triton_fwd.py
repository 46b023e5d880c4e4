"""Attention of listed blocks on NVIDIA GPUs, in Triton."""

from __future__ import annotations

from torch import Tensor

from ...mask import BlockMask


def available() -> str | None:
    """Return why this kernel cannot run on this machine, or ``None``."""
    return "it is not built yet"


def check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> str | None:
    """Return why this kernel cannot run for these arguments, or ``None``.

    Args:
        q: ``(B, H, Sq, D)`` queries.
        k: ``(B, H, Sk, D)`` keys.
        v: ``(B, H, Sk, D)`` values.
        mask: The blocks.
    """
    return available()
