"""Lookup of the transformers of a pipeline or a bare transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module

_NAMES = ("transformer", "transformer_2")


def find_transformers(target: Any) -> dict[str, Module]:
    """Return the transformers of a pipeline by name, or a bare one, without compilation and training wrappers.

    Args:
        target: A diffusers pipeline or a transformer.

    Returns:
        ``"transformer"``, and ``"transformer_2"`` if there is one; empty if ``target`` has none.
    """
    if isinstance(target, Module):
        return {_NAMES[0]: _unwrap(target)}
    found = {name: getattr(target, name, None) for name in _NAMES}
    return {name: _unwrap(model) for name, model in found.items() if isinstance(model, Module)}


def require_transformers(target: Any) -> dict[str, Module]:
    """Return the transformers of a pipeline by name, or a bare one; raise if there is none.

    Args:
        target: A diffusers pipeline or a transformer.

    Raises:
        ValueError: ``target`` has no transformer.
    """
    transformers = find_transformers(target)
    if not transformers:
        raise ValueError(
            f"{type(target).__name__} has no transformer; give a diffusers video pipeline or its transformer, "
            "a modular pipeline after load_components()"
        )
    return transformers


def _unwrap(model: Module) -> Module:
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner
