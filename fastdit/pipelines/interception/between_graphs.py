"""Attention call of a compiled transformer in training, excluded from graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .operator import attend_numbered


@torch.compiler.disable(
    reason="sparse attention with gradients runs between graphs: leave fullgraph out, or use torch.no_grad()"
)
def attend_between_graphs(*arguments: Any) -> Tensor:
    """Run an attention call in plain Python, so that autograd sees the method: ``(B, H, S, D)`` or ``(B, S, H, D)``.

    Args:
        *arguments: Those of ``attend_numbered``.
    """
    return attend_numbered(*arguments)
