"""Attention: what a method is, what it decides and remembers; the methods themselves are in ``methods``."""

from importlib import import_module

from .method import AttentionMethod, BlockMethod, get_method, list_methods, method_class, register
from .pattern import Pattern
from .state import MethodState, PatternCache

import_module(".methods", __name__)  # registers them

__all__ = [
    "AttentionMethod",
    "BlockMethod",
    "MethodState",
    "Pattern",
    "PatternCache",
    "get_method",
    "list_methods",
    "method_class",
    "register",
]
