"""Sparse attention for video diffusion transformers in Hugging Face diffusers."""

# ruff: noqa: F401  (imported for type checkers only; __getattr__ serves everyone else)

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import attach as _attach

if TYPE_CHECKING:
    from .api import (
        SparseAttention,
        disable_sparse_attention,
        enable_sparse_attention,
        find_sparse_attention,
        sparse_attention,
    )
    from .attention import AttentionMethod, MethodState, Pattern, get_method, list_methods, register
    from .attention.kernels.dispatch import block_sparse_attention, list_kernels
    from .defaults import Choice, choose
    from .functional import pattern, sparse_attention_call
    from .layout import TokenLayout
    from .mask import BlockMask
    from .pipelines import ModelFamily, list_families, register_family
    from .plans.plan import Plan
    from .schedule import Schedule
    from .tokens import AttentionCall, TokenSpec, VideoGrid

__version__ = "0.1.0"

_HOMES = {
    "api": (
        "SparseAttention",
        "disable_sparse_attention",
        "enable_sparse_attention",
        "find_sparse_attention",
        "sparse_attention",
    ),
    "attention": ("AttentionMethod", "MethodState", "Pattern", "get_method", "list_methods", "register"),
    "attention.kernels": ("block_sparse_attention", "list_kernels"),
    "defaults": ("Choice", "choose"),
    "functional": ("pattern", "sparse_attention_call"),
    "layout": ("TokenLayout",),
    "mask": ("BlockMask",),
    "pipelines": ("ModelFamily", "list_families", "register_family"),
    "schedule": ("Schedule",),
    "plans.plan": ("Plan",),
    "tokens": ("AttentionCall", "TokenSpec", "VideoGrid"),
}
_MODULES = ("api", "attention", "functional", "layout", "mask", "metrics", "pipelines", "report", "schedule", "tokens")
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

_attach.attach()


def __getattr__(name: str) -> Any:
    # Importing torch takes more than a second, and `fastdit --help` needs none of it.
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
