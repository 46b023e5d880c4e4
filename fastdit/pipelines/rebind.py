"""Bind a stock attention processor again, so that its attention call goes to a layer of ours.

A processor's ``__call__`` is bound again to a module of its own, in which only the names of the attention calls mean
something else. Nothing global is changed and no code is copied. Under ``torch.compile`` the call becomes one opaque
operator, so that policy never enters a graph: layers are told apart by a tensor, and neither a step nor a layer
causes another compilation. With gradients it runs between graphs instead, where autograd sees all that a method does.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from .runtime import LAYERS, Layer

_CALLS = ("dispatch_attention_fn", "scaled_dot_product_attention")
_PREFIX = "_fastdit_rebound."


class _Current(threading.local):
    def __init__(self) -> None:
        self.processor: Any = None


_CURRENT = _Current()


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
    heads_first: bool,
) -> Tensor:
    """Run an attention call of a compiled transformer: ``(B, H, S, D)`` or ``(B, S, H, D)``, as the model has it.

    Args:
        q: ``(B, H, S, D)`` or ``(B, S, H, D)`` queries.
        k: ``(B, H, S, D)`` or ``(B, S, H, D)`` keys.
        v: ``(B, H, S, D)`` or ``(B, S, H, D)`` values.
        mask: The mask the model passes, ``(B, 1 or H, 1 or S, S)`` or another shape that its attention call takes.
        layer: ``()`` int64, number of the layer.
        scale: The softmax scale the model passes.
        backend: The backend of diffusers that the model names.
        heads_first: Whether heads come before tokens.
    """

    def stock() -> Tensor:
        if heads_first:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        from diffusers.models import attention_dispatch

        return attention_dispatch.dispatch_attention_fn(q, k, v, attn_mask=mask, scale=scale, backend=backend)

    return _attend(LAYERS[int(layer)], q, k, v, mask, scale, None, heads_first, stock)


# Layer, step and what a method remembers decide what it does: a CUDA graph would repeat what it did in one of them.
_TAGS = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("fastdit::attention", mutates_args=(), **_TAGS)
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layer: Tensor,
    scale: float | None,
    backend: str | None,
    heads_first: bool,
) -> Tensor:
    return attend_numbered(q, k, v, mask, layer, scale, backend, heads_first).contiguous()


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layer: Tensor,
    scale: float | None,
    backend: str | None,
    heads_first: bool,
) -> Tensor:
    return torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)


def _compiled(learns: bool, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    from .hooks import attend_between_graphs

    trains = torch.is_grad_enabled() and (learns or q.requires_grad or k.requires_grad or v.requires_grad)
    return attend_between_graphs(q, k, v, *rest) if trains else _attention(q, k, v, *rest)


def _obstacle(mask: Any, dropout_p: float, is_causal: bool, enable_gqa: bool, options: dict[str, Any]) -> str | None:
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
    return None


def _dispatch_shim(source: types.ModuleType) -> Callable[..., Tensor]:
    def dispatch_attention_fn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Tensor:
        options["attention_kwargs"] = attention_kwargs
        obstacle = _obstacle(attn_mask, dropout_p, is_causal, enable_gqa, options)
        processor = _CURRENT.processor
        layer = None if processor is None else processor.fastdit_layer
        if layer is not None and obstacle is None and torch.compiler.is_compiling():
            backend = options.get("backend")
            backend = backend if backend is None or type(backend) is str else backend.value
            number, learns = processor.fastdit_number, processor.fastdit_learns
            return _compiled(learns, query, key, value, attn_mask, number, scale, backend, False)

        def stock():
            return source.dispatch_attention_fn(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **options
            )

        if layer is None or torch.compiler.is_compiling():
            return stock()
        return _attend(layer, query, key, value, attn_mask, scale, obstacle, False, stock)

    return dispatch_attention_fn


def _sdpa_shim(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    obstacle = _obstacle(attn_mask, dropout_p, is_causal, enable_gqa, {})
    processor = _CURRENT.processor
    layer = None if processor is None else processor.fastdit_layer
    if layer is not None and obstacle is None and torch.compiler.is_compiling():
        number, learns = processor.fastdit_number, processor.fastdit_learns
        return _compiled(learns, query, key, value, attn_mask, number, scale, None, True)

    def stock():
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )

    if layer is None or torch.compiler.is_compiling():
        return stock()
    return _attend(layer, query, key, value, attn_mask, scale, obstacle, True, stock)


def _twin(source: types.ModuleType, replaced: dict[str, Any]) -> types.ModuleType:
    # Dynamo looks names up in sys.modules, so the twin has to be there under a name of its own.
    name = _PREFIX + source.__name__
    if name not in sys.modules:
        twin = types.ModuleType(name)
        kept = {key: value for key, value in vars(source).items() if key not in ("__name__", "__spec__", "__loader__")}
        twin.__dict__.update(kept)
        twin.__dict__.update((key, value) for key, value in replaced.items() if key in kept)
        sys.modules[name] = twin
    return sys.modules[name]


def _refuse(processor: Any, why: str) -> RuntimeError:
    return RuntimeError(
        f"cannot intercept the attention of {type(processor).__name__}: {why}. It belongs to another add-on or to a "
        "diffusers version that works differently; reset the model's attention processors, or use diffusers >= 0.38"
    )


_CLASSES: dict[type, type] = {}


def _rebound_class(processor: Any) -> type:
    base = type(processor)
    if base in _CLASSES:
        return _CLASSES[base]
    if isinstance(processor, Module):
        raise _refuse(processor, "it is a module with weights of its own")
    stock = inspect.getattr_static(base, "__call__", None)
    if not isinstance(stock, types.FunctionType):
        raise _refuse(processor, "its __call__ is no plain function")
    if not any(name in stock.__code__.co_names for name in _CALLS):
        raise _refuse(processor, f"its __call__ uses neither {_CALLS[0]} nor {_CALLS[1]}")
    source = sys.modules[stock.__module__]
    functional = _twin(F, {"scaled_dot_product_attention": _sdpa_shim})
    shims = {"dispatch_attention_fn": _dispatch_shim(source), "F": functional}
    if not any(name in vars(source) for name in shims):
        raise _refuse(processor, f"{source.__name__} holds neither of {', '.join(shims)}")
    twin = _twin(source, shims)
    inner = types.FunctionType(stock.__code__, vars(twin), stock.__name__, stock.__defaults__, stock.__closure__)
    inner.__kwdefaults__ = stock.__kwdefaults__

    def __call__(self, *args, **kwargs):
        previous, _CURRENT.processor = _CURRENT.processor, self
        try:
            return inner(self, *args, **kwargs)
        finally:
            _CURRENT.processor = previous

    # attention modules drop the arguments that a processor's signature does not list
    __call__.__signature__ = inspect.signature(stock)
    members = {"__call__": __call__, "__deepcopy__": _copy_processor, "__reduce__": _pickle_processor}
    _CLASSES[base] = type(f"Sparse{base.__name__}", (base, Rebound), members)
    return _CLASSES[base]


class Rebound:
    """Mark processors of ours; without a layer they do what the stock one does."""

    fastdit_layer: Layer | None = None
    fastdit_number: Tensor | None = None
    fastdit_learns: bool = False  # whether the method has weights of its own, which a frozen model may train


def rebind(processor: Any, layer: Layer) -> Any:
    """Return a twin of a processor whose attention call goes to a layer.

    Args:
        processor: A stock processor.
        layer: The layer.

    Raises:
        RuntimeError: Its attention call cannot be intercepted.
    """
    rebound = object.__new__(_rebound_class(processor))
    rebound.__dict__.update(processor.__dict__)
    rebound.fastdit_layer = layer
    rebound.fastdit_number = layer.number
    rebound.fastdit_learns = layer.runtime.weights is not None
    return rebound


def stock_attributes(processor: Any) -> dict[str, Any]:
    """Return the attributes of a processor that are not ours.

    Args:
        processor: A processor of ours.
    """
    return {key: value for key, value in processor.__dict__.items() if not key.startswith("fastdit_")}


def _copy_processor(self: Any, memo: dict[int, Any]) -> Any:
    memo[id(self)] = copied = object.__new__(type(self))
    copied.__dict__.update(copy.deepcopy(stock_attributes(self), memo))
    copied.fastdit_layer = copy.deepcopy(self.fastdit_layer, memo)
    copied.fastdit_number = None if copied.fastdit_layer is None else copied.fastdit_layer.number
    copied.fastdit_learns = self.fastdit_learns
    return copied


def _pickle_processor(self: Any) -> Any:
    return stock_processor, (type(self).__mro__[1], stock_attributes(self))


def stock_processor(base: type, attributes: dict[str, Any]) -> Any:
    """Make a processor from its attributes.

    Args:
        base: Its class.
        attributes: Its attributes.
    """
    processor = object.__new__(base)
    processor.__dict__.update(attributes)
    return processor
