"""Installation and removal of the interception."""

from __future__ import annotations

import inspect
import types
from typing import Any

from torch.nn import Module

from ..families.family import ModelFamily
from ..order_once import add_crossings, crossing_modules
from ..runtime import Runtime
from ..weights import ATTRIBUTE as WEIGHTS
from .installation import ATTRIBUTE, Installation
from .rebind import (
    Rebound,
    check_interceptable,
    rebind,
    stock_attributes,
    stock_class,
    stock_processor,
)


def check_modules(transformer: Module, family: ModelFamily, modules: list[tuple[str, Module]]) -> None:
    """Check that a transformer can be intercepted, without changing it.

    Args:
        transformer: The model.
        family: Its family.
        modules: Its self-attention modules by path.

    Raises:
        RuntimeError: It cannot be intercepted.
    """
    crossing_modules(family, transformer)
    for name, module in modules:
        processor = getattr(module, "processor", None)
        if processor is None:
            raise RuntimeError(f"{name} ({type(module).__name__}) has no attention processor to intercept")
        check_interceptable(processor)


def install(transformer: Module, runtime: Runtime, modules: list[tuple[str, Module]]) -> Installation:
    """Route the attention calls of a transformer to a runtime.

    Args:
        transformer: The model, without an installation.
        runtime: Its runtime.
        modules: Its self-attention modules by path, one per layer of the runtime; they pass ``check_modules``.
    """
    # imported late, because it loads torch's compiler
    from .hooks import after_forward, before_forward, cache_context

    replaced = []
    for (_, module), layer in zip(modules, runtime.layers, strict=True):
        processor: Any = module.processor
        if isinstance(processor, Rebound):
            processor = stock_processor(stock_class(processor), stock_attributes(processor))
        replaced.append((module, processor, rebind(processor, layer)))
    for module, _, rebound in replaced:
        module.processor = rebound
    handles = [
        transformer.register_forward_pre_hook(before_forward, with_kwargs=True),
        transformer.register_forward_hook(after_forward, always_call=True),
        *add_crossings(transformer, runtime),
    ]
    parameters = list(inspect.signature(type(transformer).forward).parameters)[1:]
    installation = Installation(runtime, replaced, handles, parameters)
    transformer.__dict__[ATTRIBUTE] = installation
    if hasattr(transformer, "cache_context"):
        installation.listener = cache_context
        transformer.__dict__["cache_context"] = types.MethodType(cache_context, transformer)
    if runtime.weights is not None:
        transformer.add_module(WEIGHTS, runtime.weights.modules)
    return installation


def uninstall(transformer: Module) -> None:
    """Remove the installation. Processors that other code has replaced are left alone.

    Args:
        transformer: The model; without an installation, nothing changes.
    """
    installation = transformer.__dict__.pop(ATTRIBUTE, None)
    if installation is None:
        return
    for handle in installation.handles:
        handle.remove()
    listener = getattr(transformer.__dict__.get("cache_context"), "__func__", None)
    if listener is not None and listener is installation.listener:
        del transformer.__dict__["cache_context"]
    if installation.runtime.weights is not None:
        transformer._modules.pop(WEIGHTS, None)
    for module, stock, rebound in installation.replaced:
        if module.processor is rebound:
            stock.__dict__.update(stock_attributes(rebound))
            module.processor = stock
        rebound.fastdit_layer = rebound.fastdit_number = None
