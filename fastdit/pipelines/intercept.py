"""Install the interception on a transformer, and take it back."""

from __future__ import annotations

import copy
import inspect
import types
from typing import Any

from torch.nn import Module

from .base import ModelFamily
from .crossing import add_crossings, crossing_modules
from .rebind import (
    Rebound,
    check_interceptable,
    follow_patches,
    rebind,
    stock_attributes,
    stock_class,
    stock_processor,
)
from .runtime import Runtime
from .weights import ATTRIBUTE as WEIGHTS

ATTRIBUTE = "_fastdit"


class Installation:
    """Hold what was changed on a transformer, to take it back.

    Args:
        runtime: What runs its attention.
        replaced: The attention modules, with their stock and their rebound processors.
        handles: The hooks.
        parameters: Names of the arguments of its forward.
    """

    def __init__(
        self, runtime: Runtime, replaced: list[tuple[Module, Any, Any]], handles: list[Any], parameters: list[str]
    ) -> None:
        self.runtime = runtime
        self.replaced = replaced
        self.handles = handles
        self.parameters = parameters
        self.listener: Any = None
        self.owner: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Installation:
        copies = (copy.deepcopy(value, memo) for value in (self.runtime, self.replaced, self.handles))
        copied = Installation(*copies, list(self.parameters))
        copied.listener = self.listener
        return copied

    def __reduce__(self) -> Any:
        return _nothing, ()

    def check(self) -> None:
        """Check that the processors are still ours, and let patched functions act.

        Raises:
            RuntimeError: A processor was replaced, or its ``__call__`` patched.
        """
        for (module, _, rebound), layer in zip(self.replaced, self.runtime.layers, strict=True):
            if module.processor is not rebound:
                raise RuntimeError(
                    f"the attention processor of {layer.name} was replaced by {type(module.processor).__name__} after "
                    "sparse attention was enabled (fuse_qkv_projections() and set_attn_processor() do that): change "
                    "processors first, then call enable_sparse_attention() again"
                )
        follow_patches(rebound for _, _, rebound in self.replaced)


def _nothing() -> None:
    return None


def installed(transformer: Module) -> Installation | None:
    """Return what is installed on a transformer, or ``None``.

    Args:
        transformer: The model.
    """
    return transformer.__dict__.get(ATTRIBUTE)


def check_modules(transformer: Module, family: ModelFamily, modules: list[tuple[str, Module]]) -> None:
    """Check that a transformer can be intercepted; nothing is changed.

    Args:
        transformer: The model.
        family: Its family.
        modules: Its self-attention modules by path.

    Raises:
        RuntimeError: It cannot.
    """
    crossing_modules(family, transformer)
    for name, module in modules:
        processor = getattr(module, "processor", None)
        if processor is None:
            raise RuntimeError(f"{name} ({type(module).__name__}) has no attention processor to intercept")
        check_interceptable(processor)


def install(transformer: Module, runtime: Runtime, modules: list[tuple[str, Module]]) -> Installation:
    """Lead the attention calls of a transformer to a runtime.

    Args:
        transformer: The model; nothing is installed on it.
        runtime: What runs its attention.
        modules: Its self-attention modules by path, as many as the runtime has layers; ``check_modules`` takes them.
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
    """Take everything back. Processors that something else has replaced meanwhile are left alone.

    Args:
        transformer: The model; without an installation nothing happens.
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
