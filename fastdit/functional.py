"""Functional API for custom models: one attention call, or its pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .attention import AttentionMethod, MethodState, Pattern, get_method
from .attention.kernels.dispatch import check_call, check_tensors
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
    """Compute one sparse self-attention call.

    Args:
        q: ``(B, H, S, D)`` queries, after normalisation and rotary embedding.
        k: ``(B, H, S, D)`` keys, likewise.
        v: ``(B, H, S, D)`` values.
        grid: ``(frames, height, width)`` of the video tokens.
        method: Name of a method, or a method.
        text_tokens: Text tokens in the same sequence, at least 0.
        text_first: Whether they come before the video.
        scale: Softmax scale; default ``D ** -0.5``.
        key_padding: ``(B, S)`` bool, True where a key is padding, anywhere in the text. Real text is moved first,
            with copies if needed; checking this synchronises with a GPU.
        kernel: One of ``list_kernels()``; default: that of ``state``, or the fastest that can run.
        precision: ``"int8"`` or ``"int8_fp8"`` for products in low precision; default: that of ``state``, or of the
            inputs.
        state: State of the method between calls; default: none.
        **fields: Fields of the method, if given by name.

    Returns:
        ``(B, H, S, D)`` in the dtype of ``q``.

    Raises:
        ValueError: Method or kernel is unknown, a value is out of range, shapes or devices do not match, the tokens do
            not add up to ``S``, video tokens are padding, or ``state`` has another kernel or precision.
        TypeError: The method has no such field, a method object is given together with fields, or dtypes are wrong.
    """
    method = _method(method, fields)
    tokens = TokenSpec(VideoGrid(*grid), text_tokens, text_first)
    check_call(q, k, v, scale=scale, kernel=kernel, precision=precision)
    _check_lengths(tokens, q, k)
    state = MethodState(kernel=kernel, precision=precision) if state is None else state
    for name, given, known in (("kernel", kernel, state.kernel), ("precision", precision, state.precision)):
        if given not in (None, known):
            raise ValueError(f"{name}={given!r} was given with a state whose {name} is {known!r}; give it to one alone")
    order = None
    if key_padding is not None:
        _check_padding(key_padding, q, None if method.stock else tokens)
        order = None if method.stock else _real_text_first(key_padding, tokens)
        if order is not None:
            key_padding = key_padding.gather(1, order)
            q, k, v = (_in_order(x, order) for x in (q, k, v))
    call = AttentionCall(tokens=tokens, scale=scale, key_padding=key_padding)
    with torch.autocast(q.device.type, enabled=False):  # selection and sums choose their own precision
        out = method.forward(q, k, v, call, state)
    return out if order is None else _in_order(out, order.argsort(1))


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
        TypeError: Likewise.
    """
    method = _method(method, fields)
    tokens = TokenSpec(VideoGrid(*grid), text_tokens, text_first)
    if q is None or k is None:
        if not method.static:
            raise ValueError(f"method {method.name!r} chooses its blocks from queries and keys: give q and k")
        q = k = torch.zeros(1, 1, 1, 1, dtype=torch.float32).expand(1, 1, tokens.num_tokens, 1)
    check_tensors(q, k, k)
    _check_lengths(tokens, q, k)
    with torch.autocast(q.device.type, enabled=False):
        return method.pattern(q, k, AttentionCall(tokens=tokens), MethodState())


def _method(method: str | AttentionMethod, fields: Mapping[str, Any]) -> AttentionMethod:
    if isinstance(method, str):
        return get_method(method, **fields)
    if not isinstance(method, AttentionMethod):
        raise TypeError(f"method must be a name or a method, got {type(method).__name__}")
    if fields:
        raise TypeError(f"fields ({', '.join(fields)}) cannot be combined with a method object; give its name instead")
    return method


def _check_lengths(tokens: TokenSpec, q: Tensor, k: Tensor) -> None:
    if not tokens.num_tokens == q.shape[2] == k.shape[2]:
        raise ValueError(
            f"a grid of {tokens.grid} and {tokens.text_tokens} text tokens make {tokens.num_tokens} tokens, "
            f"but q has {q.shape[2]} and k has {k.shape[2]}; this is for self-attention, where q and k hold all tokens"
        )


def _check_padding(padding: Tensor, q: Tensor, tokens: TokenSpec | None) -> None:
    shape = (q.shape[0], q.shape[2])
    if padding.dtype != torch.bool or tuple(padding.shape) != shape or padding.device != q.device:
        raise ValueError(
            f"key_padding must be {shape} bool on {q.device}, True where a key is padding, got {tuple(padding.shape)} "
            f"{padding.dtype} on {padding.device}"
        )
    video = padding[:, :0] if tokens is None else padding[:, tokens.video]  # dense attention accepts padding anywhere
    if bool(video.any()):
        raise ValueError(
            f"key_padding marks {video.sum(1).tolist()} video tokens of the samples as padding, but only text may be "
            "padded; give videos of one size, or each sample in a call of its own"
        )


def _real_text_first(padding: Tensor, tokens: TokenSpec) -> Tensor | None:
    """Return an order with real text before padding in each sample, ``(B, S)`` int64; ``None`` if it is already so."""
    text = padding[:, tokens.text]
    if not bool((text[:, :-1] & ~text[:, 1:]).any()):
        return None
    order = torch.arange(tokens.num_tokens, device=padding.device).repeat(len(padding), 1)
    order[:, tokens.text] = text.to(torch.uint8).argsort(dim=1, stable=True) + tokens.text.start
    return order


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(2, order[:, None, :, None].expand_as(x))
