"""Fingerprints of models and arguments, which tell kept scores apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..plans.plan import config_hash

_LOOK = 8


def fingerprint(transformer: Module) -> dict[str, str]:
    """Return what tells a model from others: its class, and hashes of its configuration and of some of its weights.

    Args:
        transformer: The model.
    """
    weights = hashlib.sha256()
    for name, parameter in transformer.named_parameters():
        weights.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:  # offloaded weights are out of sight
            some = parameter.detach().flatten()[:_LOOK]
            weights.update((some.float() if some.is_floating_point() else some.long()).cpu().numpy().tobytes())
    config: Any = transformer.config
    return {
        "class": type(transformer).__name__,
        "config": config_hash(dict(config)),
        "weights": weights.hexdigest()[:16],
    }


def plain(value: Any) -> Any:
    """Return JSON values that stand for any value: a hash for a tensor or an image.

    Args:
        value: The value.
    """
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
    if hasattr(value, "tobytes"):
        return f"{type(value).__name__} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    return repr(value)
