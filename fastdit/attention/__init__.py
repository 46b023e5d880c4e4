"""Methods: which blocks of attention are computed. One file each."""

from importlib import import_module

from .base import AttentionMethod, BlockMethod, Pattern, get_method, list_methods, method_class, register
from .state import MethodState, PatternCache

METHODS = ("dense", "radial", "draft", "adaspa", "paro", "sla", "sparse_vdit", "profiled")

for _name in METHODS:
    import_module(f".{_name}", __name__)

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
