"""Hooks that report forward passes to a runtime, outside of compiled graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module

from ..order_once import check_crossed, order_once
from ..run_tracker import PassContext
from .installation import installed


@torch.compiler.disable
def before_forward(transformer: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check the processors, and pass the arguments on by name.

    Args:
        transformer: The model.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
    """
    installation = installed(transformer)
    if installation is None:
        return
    installation.check()
    arguments = dict(zip(installation.parameters, args, strict=False)) | kwargs
    installation.runtime.begin(transformer, arguments)
    order_once(installation.runtime, transformer, arguments)


@torch.compiler.disable
def after_forward(transformer: Module, args: tuple[Any, ...], output: Any) -> None:
    """Report the end of a forward pass to the runtime.

    Args:
        transformer: The model.
        args: Not used.
        output: Its output; ``None`` if it raised.
    """
    installation = installed(transformer)
    if installation is not None:
        installation.runtime.end(transformer, failed=output is None)
        if output is not None:
            check_crossed(installation.runtime)


@contextmanager
def cache_context(transformer: Module, name: str, **kwargs: Any) -> Iterator[None]:
    """Record the context of a forward pass and pass it on to diffusers.

    Args:
        transformer: The model, on whose instance this shadows the method of the same name.
        name: The guidance pass.
        **kwargs: Fields of ``diffusers.hooks.CacheContext``.
    """
    stock: Any = type(transformer).cache_context
    installation = installed(transformer)
    if installation is None:
        with stock(transformer, name, **kwargs):
            yield
        return
    said = PassContext(name, kwargs.get("step_index"), kwargs.get("num_inference_steps"))
    with installation.runtime.tracker.named(said), stock(transformer, name, **kwargs):
        yield
