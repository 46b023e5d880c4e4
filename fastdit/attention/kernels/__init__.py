"""Kernels: they compute listed blocks and know neither models nor methods; ``dispatch`` is the only door to them."""

from .dispatch import (
    block_sparse_attention,
    check_call,
    check_inputs,
    check_tensors,
    choose_kernel,
    explain_kernels,
    list_kernels,
    list_precisions,
    low_precision_reason,
)

__all__ = [
    "block_sparse_attention",
    "check_call",
    "check_inputs",
    "check_tensors",
    "choose_kernel",
    "explain_kernels",
    "list_kernels",
    "list_precisions",
    "low_precision_reason",
]
