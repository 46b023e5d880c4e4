"""Rebinding of attention processors, so that their attention call goes to a fastdit layer.

A processor's ``__call__`` is rebound to a copy of its module in which only the names of the attention functions differ.
Nothing global is changed and no code is copied. Under ``torch.compile`` the call becomes one opaque operator. A tensor
identifies the layer, so neither a step nor a layer triggers recompilation. With gradients the call runs between graphs
instead, so that autograd sees the method.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from ..obstacles import as_autocast, find_obstacle
from ..runtime import Layer
from .operator import _attend, _attention
from .twins import Twin, find_twin

_CALLS = ("dispatch_attention_fn", "scaled_dot_product_attention")


class _Current(threading.local):
    def __init__(self) -> None:
        self.processor: Any = None


_CURRENT = _Current()


def _compiled(learns: bool, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    from .between_graphs import attend_between_graphs

    q, k, v = as_autocast(q, k, v)
    trains = torch.is_grad_enabled() and (learns or q.requires_grad or k.requires_grad or v.requires_grad)
    return attend_between_graphs(q, k, v, *rest) if trains else _attention(q, k, v, *rest)


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
        obstacle = find_obstacle(attn_mask, dropout_p, is_causal, enable_gqa, options)
        processor = _CURRENT.processor
        layer = None if processor is None else processor.fastdit_layer
        if layer is not None and obstacle is None and torch.compiler.is_compiling():
            backend = options.get("backend")
            backend = backend if backend is None or type(backend) is str else backend.value
            number, learns = processor.fastdit_number, processor.fastdit_learns
            return _compiled(learns, query, key, value, attn_mask, number, scale, backend, source.__name__)

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
    obstacle = find_obstacle(attn_mask, dropout_p, is_causal, enable_gqa, {})
    processor = _CURRENT.processor
    layer = None if processor is None else processor.fastdit_layer
    if layer is not None and obstacle is None and torch.compiler.is_compiling():
        number, learns = processor.fastdit_number, processor.fastdit_learns
        return _compiled(learns, query, key, value, attn_mask, number, scale, None, None)

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


_CLASSES: dict[type, type[Rebound]] = {}


def _refuse(processor: type, why: str) -> RuntimeError:
    return RuntimeError(
        f"cannot intercept the attention of {processor.__name__}: {why}. It belongs to another add-on or to a "
        "diffusers version that works differently; reset the model's attention processors, or use diffusers >= 0.38"
    )


def _rebound_class(base: type) -> type[Rebound]:
    if issubclass(base, Module):
        raise _refuse(base, "it is a module with weights of its own")
    stock = inspect.getattr_static(base, "__call__", None)
    if not isinstance(stock, types.FunctionType):
        raise _refuse(base, "its __call__ is no plain function")
    if not any(name in stock.__code__.co_names for name in _CALLS):
        raise _refuse(base, f"its __call__ uses neither {_CALLS[0]} nor {_CALLS[1]}")
    source = sys.modules.get(stock.__globals__.get("__name__", ""))
    if source is None or vars(source) is not stock.__globals__:
        raise _refuse(base, "its __call__ comes from no module that is loaded")
    functional = find_twin(F, lambda: {"scaled_dot_product_attention": _sdpa_shim})
    twin = find_twin(source, lambda: {"dispatch_attention_fn": _dispatch_shim(source), "F": functional.module})
    if not any(name in vars(source) for name in twin.replaced):
        raise _refuse(base, f"{source.__name__} holds neither of {', '.join(twin.replaced)}")
    known = _CLASSES.get(base)
    if known is None or known.fastdit_changed() or known.fastdit_twins != (functional, twin):
        known = _CLASSES[base] = _make_class(base, stock, (functional, twin))
    return known


def _make_class(base: type, stock: types.FunctionType, twins: tuple[Twin, ...]) -> type[Rebound]:
    namespace = vars(twins[-1].module)
    inner = types.FunctionType(stock.__code__, namespace, stock.__name__, stock.__defaults__, stock.__closure__)
    inner.__kwdefaults__ = stock.__kwdefaults__

    def __call__(self, *args, **kwargs):
        previous, _CURRENT.processor = _CURRENT.processor, self
        layer = self.fastdit_layer
        if layer is not None and not torch.compiler.is_compiling():
            layer.entered()
        try:
            return inner(self, *args, **kwargs)
        finally:
            _CURRENT.processor = previous

    # attention modules drop arguments missing from a processor's signature
    __call__.__signature__ = inspect.signature(stock)
    members = {
        "__call__": __call__,
        "__deepcopy__": _copy_processor,
        "__reduce__": _pickle_processor,
        "fastdit_stock": (stock, _parts(stock)),
        "fastdit_twins": twins,
    }
    return type(f"Sparse{base.__name__}", (base, Rebound), members)


def _introduce(kind: type, base: type) -> None:
    # diffusers looks up the replacement for skipped attention by processor class
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    with contextlib.suppress(ValueError):
        AttentionProcessorRegistry.register(kind, AttentionProcessorRegistry.get(base))


def _parts(function: Any) -> tuple[Any, ...]:
    return tuple(getattr(function, name, None) for name in ("__code__", "__defaults__", "__kwdefaults__"))


class Rebound:
    """The base class of rebound processors; without a layer they behave like the original."""

    fastdit_layer: Layer | None = None
    fastdit_number: Tensor | None = None
    fastdit_learns: bool = False  # whether the method has trainable weights, which a frozen model may train
    fastdit_stock: tuple[Any, tuple[Any, ...]]
    fastdit_twins: tuple[Twin, ...]

    @classmethod
    def fastdit_changed(cls) -> bool:
        """Return whether the original ``__call__`` has been replaced."""
        function, parts = cls.fastdit_stock
        current = inspect.getattr_static(cls.__mro__[1], "__call__", None)
        return current is not function or _parts(current) != parts


def stock_class(processor: Any) -> type:
    """Return the class of a processor; for a rebound one, the original class.

    Args:
        processor: The processor.
    """
    kind = type(processor)
    return kind.__mro__[1] if issubclass(kind, Rebound) else kind


def check_interceptable(processor: Any) -> None:
    """Check that the attention call of a processor can be intercepted.

    Args:
        processor: An original or a rebound processor.

    Raises:
        RuntimeError: It cannot be intercepted.
    """
    _rebound_class(stock_class(processor))


def follow_patches(processors: Iterable[Any]) -> None:
    """Adopt functions patched since processors were rebound.

    Args:
        processors: Rebound processors.

    Raises:
        RuntimeError: The ``__call__`` of an original processor was patched.
    """
    kinds: set[type[Rebound]] = {type(processor) for processor in processors}
    for kind in kinds:
        if kind.fastdit_changed():
            raise RuntimeError(
                f"the __call__ of {kind.__mro__[1].__name__} was replaced after sparse attention was enabled: call "
                "enable_sparse_attention() again"
            )
    for twin in {twin for kind in kinds for twin in kind.fastdit_twins}:
        twin.refresh()


def rebind(processor: Any, layer: Layer) -> Any:
    """Return a copy of a processor whose attention call goes to a layer.

    Args:
        processor: An original processor.
        layer: The layer.

    Raises:
        RuntimeError: Its attention call cannot be intercepted.
    """
    kind = _rebound_class(type(processor))
    _introduce(kind, type(processor))
    rebound = object.__new__(kind)
    rebound.__dict__.update(processor.__dict__)
    rebound.fastdit_layer = layer
    rebound.fastdit_number = layer.number
    rebound.fastdit_learns = layer.runtime.weights is not None
    return rebound


def stock_attributes(processor: Any) -> dict[str, Any]:
    """Return the attributes of the original processor.

    Args:
        processor: A rebound processor.
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
    return stock_processor, (stock_class(self), stock_attributes(self))


def stock_processor(base: type, attributes: dict[str, Any]) -> Any:
    """Create a processor from its attributes.

    Args:
        base: Its class.
        attributes: Its attributes.
    """
    processor = object.__new__(base)
    processor.__dict__.update(attributes)
    return processor
