"""Detection of third-party code inside a transformer that replaces a forward or may see tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module

TRUSTED = ("torch", "diffusers", "peft", "accelerate", "fastdit", "bitsandbytes", "torchao", "optimum")
"""Packages whose modules process tokens independently in diffusers models."""

BLIND = ("group_offloading", "lazy_prefetch_group_offloading", "layerwise_casting", "peft_autocast_disable")
"""Hooks of diffusers that move or cast weights and do not read tokens."""


def replaced(module: Module) -> bool:
    """Return whether third-party code computes the output of a module; hooks registered by diffusers do not count.

    Args:
        module: A module of a transformer.
    """
    own: dict[str, Any] = module.__dict__
    calls = [type(module).forward]
    if "processor" in own:
        calls.append(type(own["processor"]).__call__)
    if any(getattr(call, "__globals__", {}).get("__name__", "").partition(".")[0] not in TRUSTED for call in calls):
        return True
    # accelerate wraps forward to move weights and keeps the original
    wrapped = type(own.get("_hf_hook")).__module__.startswith("accelerate.")
    forward = own.get("_old_forward" if wrapped else "forward")
    if forward is None or _registered(module):
        return False
    return getattr(forward, "__func__", None) is not type(module).forward


def watched(transformer: Module, ours: type) -> bool:
    """Return whether third-party code may see, change or store tokens inside a transformer.

    Args:
        transformer: The model.
        ours: The type of the forward hooks that do not count.
    """
    hooks = torch.nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return True
    if getattr(transformer, "is_cache_enabled", False):
        return True
    return any(
        replaced(module)
        or not _registered(module) <= set(BLIND)
        # hooks on the transformer itself see only its inputs and outputs
        or (module is not transformer and module._forward_pre_hooks)
        or (module is not transformer and not all(isinstance(hook, ours) for hook in module._forward_hooks.values()))
        for module in transformer.modules()
    )


def _registered(module: Module) -> set[str]:
    registry: Any = module.__dict__.get("_diffusers_hook")
    return set() if registry is None else set(registry.hooks)
