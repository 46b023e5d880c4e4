"""Block-sparse attention kernels, independent of models and methods; ``dispatch`` is their entry point."""

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
