"""Sparse attention for a model of your own: one call, or the pattern of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .attention import AttentionMethod, MethodState, Pattern, get_method
from .tokens import AttentionCall, TokenSpec, VideoGrid


def sparse_attention_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int, int],
    method: str | AttentionMethod,
    text_tokens: int = 0,
    text_first: bool = False,
    scale: float | None = None,
    key_padding: Tensor | None = None,
    kernel: str | None = None,
    precision: str | None = None,
    state: MethodState | None = None,
    **fields: Any,
) -> Tensor:
    """Compute one sparse self-attention call, for a model of your own.

    Args:
        q: ``(B, H, S, D)`` queries, after normalisation and rotary embedding.
        k: ``(B, H, S, D)`` keys, likewise.
        v: ``(B, H, S, D)`` values.
        grid: ``(frames, height, width)`` of the video tokens.
        method: Name of a method, or a method.
        text_tokens: Text tokens in the same sequence, at least 0.
        text_first: Whether they come before the video.
        scale: Softmax scale; default ``D ** -0.5``.
        key_padding: ``(B, S)`` bool, True where a key is padding; in each sample real text comes before it.
        kernel: One of ``list_kernels()``; default: the fastest that can run.
        precision: ``"int8"`` or ``"int8_fp8"`` for products in low precision; default: that of the inputs.
        state: What the method remembers from call to call, kernel and precision included; default: nothing.
        **fields: Fields of the method, if given by name.

    Returns:
        ``(B, H, S, D)`` in the dtype of ``q``.

    Raises:
        ValueError: Method or kernel is unknown, a value is out of range, or the tokens do not add up to ``S``.
        TypeError: The method has no such field, or a method object is given together with fields.
    """
    method = _method(method, fields)
    tokens = TokenSpec(VideoGrid(*grid), text_tokens, text_first)
    _check_length(tokens, q.shape[2])
    call = AttentionCall(tokens=tokens, scale=scale, key_padding=key_padding)
    state = MethodState(kernel=kernel, precision=precision) if state is None else state
    with torch.autocast(q.device.type, enabled=False):  # blocks are chosen, and sums made, in the precision they need
        return method.forward(q, k, v, call, state)


def pattern(
    method: str | AttentionMethod,
    *,
    grid: tuple[int, int, int],
    text_tokens: int = 0,
    text_first: bool = False,
    q: Tensor | None = None,
    k: Tensor | None = None,
    **fields: Any,
) -> Pattern:
    """Return the pattern a method chooses, without computing attention.

    Args:
        method: Name of a method, or a method.
        grid: ``(frames, height, width)`` of the video tokens.
        text_tokens: Text tokens in the same sequence, at least 0.
        text_first: Whether they come before the video.
        q: ``(B, H, S, D)`` queries; static methods need none.
        k: ``(B, H, S, D)`` keys; static methods need none.
        **fields: Fields of the method, if given by name.

    Raises:
        ValueError: The method needs q and k and they are missing, or as for ``sparse_attention_call``.
        TypeError: The method has no such field, or a method object is given together with fields.
    """
    method = _method(method, fields)
    tokens = TokenSpec(VideoGrid(*grid), text_tokens, text_first)
    if q is None or k is None:
        if not method.static:
            raise ValueError(f"method {method.name!r} chooses its blocks from queries and keys: give q and k")
        q = k = torch.zeros(1, 1, 1, 1).expand(1, 1, tokens.num_tokens, 1)
    _check_length(tokens, q.shape[2])
    return method.pattern(q, k, AttentionCall(tokens=tokens), MethodState())


def _method(method: str | AttentionMethod, fields: Mapping[str, Any]) -> AttentionMethod:
    if isinstance(method, str):
        return get_method(method, **fields)
    if not isinstance(method, AttentionMethod):
        raise TypeError(f"method must be a name or a method, got {type(method).__name__}")
    if fields:
        raise TypeError(f"fields ({', '.join(fields)}) cannot be combined with a method object; give its name instead")
    return method


def _check_length(tokens: TokenSpec, length: int) -> None:
    if tokens.num_tokens != length:
        raise ValueError(
            f"a grid of {tokens.grid} and {tokens.text_tokens} text tokens make {tokens.num_tokens} tokens, "
            f"but q has {length}"
        )
