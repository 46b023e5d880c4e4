"""Features of an attention call that only the model's own attention supports, and its casts under autocast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


def find_obstacle(
    mask: Any, dropout_p: float, is_causal: bool, enable_gqa: bool, options: Mapping[str, Any]
) -> str | None:
    """Return why an attention call has to remain the model's own, or ``None``.

    Args:
        mask: The mask the model passes.
        dropout_p: Dropout, in [0, 1].
        is_causal: Whether attention is causal.
        enable_gqa: Whether queries are grouped.
        options: Other arguments, by name.
    """
    if options.get("parallel_config") is not None:
        return "context parallelism splits the sequence"
    if is_causal:
        return "the model asks for causal attention"
    if dropout_p:
        return "the model asks for attention dropout"
    if enable_gqa:
        return "the model asks for grouped queries"
    if options.get("attention_kwargs"):
        return "the model passes attention_kwargs"
    if mask is not None and not isinstance(mask, Tensor):
        return f"the model passes a {type(mask).__name__} of its own"
    for mode in _get_current_function_mode_stack():
        if not isinstance(mode, DeviceContext):  # torch.device affects only new tensors
            return f"{type(mode).__name__} intercepts the functions of torch"
    return None


def as_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast q, k and v as PyTorch's own attention does under autocast, where norms may leave different dtypes.

    Args:
        q: ``(B, H, S, D)`` or ``(B, S, H, D)`` queries.
        k: ``(B, H, S, D)`` or ``(B, S, H, D)`` keys.
        v: ``(B, H, S, D)`` or ``(B, S, H, D)`` values.

    Returns:
        Queries, keys and values, each ``(B, H, S, D)`` or ``(B, S, H, D)`` as before.
    """
    device = q.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x

    return cast(q), cast(k), cast(v)
