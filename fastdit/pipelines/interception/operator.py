"""Custom operator for attention calls in compiled graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..obstacles import as_autocast
from ..runtime import LAYERS, Layer

# its behaviour depends on layer, step and memory; a CUDA graph would repeat that of one step
_TAGS = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


def _attend(
    layer: Layer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    scale: float | None,
    obstacle: str | None,
    heads_first: bool,
    stock: Callable[[], Tensor],
) -> Tensor:
    q, k, v = as_autocast(q, k, v)
    if not heads_first:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    call = layer.plan(q, k, v, mask, scale, obstacle)
    if call is None:
        return layer.run_dense(stock, q.device)
    out = layer.run_sparse(q, k, v, call)
    return out if heads_first else out.transpose(1, 2)


def attend_numbered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layer: Tensor,
    scale: float | None,
    backend: str | None,
    source: str | None,
) -> Tensor:
    """Run an attention call of a compiled transformer: ``(B, H, S, D)`` or ``(B, S, H, D)``, as in the model.

    Args:
        q: ``(B, H, S, D)`` or ``(B, S, H, D)`` queries.
        k: ``(B, H, S, D)`` or ``(B, S, H, D)`` keys.
        v: ``(B, H, S, D)`` or ``(B, S, H, D)`` values.
        mask: The mask the model passes, ``(B, 1 or H, 1 or S, S)`` or another shape that its attention call takes.
        layer: ``()`` int64, number of the layer.
        scale: The softmax scale the model passes.
        backend: The backend of diffusers that the model names.
        source: The module whose ``dispatch_attention_fn`` the model calls, with tokens before heads; ``None`` where it
            calls PyTorch's attention, with heads before tokens.
    """

    def stock() -> Tensor:
        if source is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return sys.modules[source].dispatch_attention_fn(q, k, v, attn_mask=mask, scale=scale, backend=backend)

    return _attend(LAYERS[int(layer)], q, k, v, mask, scale, None, source is None, stock)


@torch.library.custom_op("fastdit::attention", mutates_args=(), **_TAGS)
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layer: Tensor,
    scale: float | None,
    backend: str | None,
    source: str | None,
) -> Tensor:
    return attend_numbered(q, k, v, mask, layer, scale, backend, source).contiguous()


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layer: Tensor,
    scale: float | None,
    backend: str | None,
    source: str | None,
) -> Tensor:
    return torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
