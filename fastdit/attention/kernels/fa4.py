"""FlashAttention-4 over listed blocks, from the package flash-attn-4, for compute capability 9.0 and 10.x."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from ...mask import BlockMask
from .device import launching_on
from .options import Options

PACKAGE = "flash-attn-4"


def available() -> str | None:
    """Return why this kernel cannot run on this machine, or ``None``."""
    if not _installed():
        return f"the package {PACKAGE} is not installed; pip install 'fastdit[fa4]'"
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs, and this build of torch is for AMD"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options) -> str | None:
    """Return why this kernel cannot run for these arguments, or ``None``."""
    if not q.is_cuda:
        return f"it needs CUDA tensors, got {q.device}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 and fp16, got {q.dtype}"
    if any(x.stride(3) != 1 for x in (q, k, v)):
        return "it needs q, k and v with a contiguous last axis; call .contiguous()"
    for name in ("compensate", "precision", "variant"):
        if getattr(options, name) is not None:
            return f"it does not support {name}={getattr(options, name)!r}; set {name}=None"
    if options.index is not None:
        return "it takes tokens in the order of the mask and no index; put them in order"
    if options.scale <= 0:
        return f"it takes positive scales, got {options.scale}"
    capability = torch.cuda.get_device_capability(q.device)
    return shape_reason(capability, q.shape[3], q.shape[2], mask.block_q, mask.block_k, backward=_trains(q, k, v))


def shape_reason(
    capability: tuple[int, int], head_dim: int, tokens_q: int, block_q: int, block_k: int, *, backward: bool
) -> str | None:
    """Return why the package has no kernel for these sizes, or ``None``.

    Its tiles must divide the blocks of queries, and be the blocks of keys, which only 10.x can split. On 10.x a program
    takes two tiles of queries at once.

    Args:
        capability: Compute capability of the GPU.
        head_dim: At least 1.
        tokens_q: Queries, at least 1.
        block_q: Queries in a block of the mask, at least 1.
        block_k: Keys in a block of the mask, at least 1.
        backward: Whether gradients will be asked for.
    """
    version = ".".join(map(str, capability))
    if capability[0] not in (9, 10):
        return f"it needs compute capability 9.0 or 10.x, this is {version}"
    if head_dim % 8 or head_dim > 128:
        return f"it takes head dims that are multiples of 8 up to 128, got {head_dim}"
    if capability[0] == 9:
        multiple_q = 128 if backward and head_dim <= 64 else 64
        fits_k, sizes_k = (block_k == 128, "128") if backward else (block_k in (64, 128), "64 or 128")
    else:
        multiple_q = 256 if tokens_q > 128 else 128
        fits_k, sizes_k = block_k % 128 == 0, "a multiple of 128"
    what = f"{'with' if backward else 'without'} gradients on compute capability {version}"
    if block_q % multiple_q:
        return f"it takes query blocks of a multiple of {multiple_q} tokens {what}, got {block_q}"
    return None if fits_k else f"it takes key blocks of {sizes_k} tokens {what}, got {block_k}"


def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options) -> tuple[Tensor, Tensor]:
    """Compute the attention of listed blocks; compiled at the first call of a kind, which takes seconds."""
    attention = importlib.import_module("flash_attn.cute").flash_attn_func
    blocks = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    size = (mask.block_q, mask.block_k)
    backward = blocks(*query_lists(mask), block_size=size) if _trains(q, k, v) else None
    with launching_on(q.device):
        out, lse = attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            softmax_scale=options.scale,
            mask_mod=_real_keys(mask.block_k),
            aux_tensors=[key_ends(mask).expand(*q.shape[:2], -1)],
            block_sparse_tensors=blocks(*key_lists(mask), block_size=size),
            block_sparse_tensors_bwd=backward,
            return_lse=True,
        )
    return out.transpose(1, 2), lse.detach()


def key_lists(mask: BlockMask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the key blocks of each query block, in the format of the package, computed once per mask.

    Nothing waits for the device, so every list has room for all key blocks.

    Args:
        mask: The blocks.

    Returns:
        Counts ``(B or 1, H or 1, Nq)`` and lists ``(B or 1, H or 1, Nq, Nk)`` of ragged blocks, then those of full
        ones, all int32, each list ascending; entries past a count have no meaning.
    """
    if "fa4_keys" not in mask.derived:
        room = mask.num_k - mask.indices.shape[-1]
        stored = torch.nn.functional.pad(mask.indices, (0, room))
        full = torch.where((mask.counts == mask.num_k)[..., None], mask.every, stored).contiguous()
        place = torch.arange(mask.num_k, device=mask.device) + mask.full_counts[..., None]
        ragged = full.gather(-1, place.clamp(max=mask.num_k - 1))
        counts = (mask.counts - mask.full_counts).contiguous()
        mask.derived["fa4_keys"] = (counts, ragged, mask.full_counts.contiguous(), full)
    return mask.derived["fa4_keys"]


def query_lists(mask: BlockMask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the query blocks of each key block, in the format of the package's backward, computed once per mask.

    Args:
        mask: The blocks.

    Returns:
        Counts ``(B or 1, H or 1, Nk)`` and lists ``(B or 1, H or 1, Nk, Nq)`` for ragged key blocks, 0 for others, then
        those for full ones, all int32, each list ascending; entries past a count have no meaning.
    """
    if "fa4_queries" not in mask.derived:
        listed = mask.to_dense().mT
        lists = listed.to(torch.int8).argsort(dim=-1, descending=True, stable=True).int()
        counts, ragged = listed.sum(-1, dtype=torch.int32), mask.ragged_blocks
        mask.derived["fa4_queries"] = (counts * ragged, lists, counts * ~ragged, lists)
    return mask.derived["fa4_queries"]


def key_ends(mask: BlockMask) -> Tensor:
    """Return where the real keys of each key block end: ``(B or 1, H or 1, Nk)`` int32, counted from the first key.

    Args:
        mask: The blocks.
    """
    starts = torch.arange(mask.num_k, dtype=torch.int32, device=mask.device) * mask.block_k
    return starts + mask.lengths_k


@cache
def _real_keys(block_k: int) -> Callable[..., Any]:
    """Make the mask function of ragged blocks that the package compiles in: whether a key is real."""
    cutlass, cute = importlib.import_module("cutlass"), importlib.import_module("cutlass.cute")
    as_vector = importlib.import_module("flash_attn.cute.utils").scalar_to_ssa
    integer = cutlass.Int32

    @cute.jit
    def real_keys(batch, head, query, key, lengths, tensors):
        return key < as_vector(tensors[0][batch[0], head[0], key[0] // block_k], integer)

    return real_keys


def _trains(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


@cache
def _installed() -> bool:
    try:
        return bool(version(PACKAGE))
    except PackageNotFoundError:
        return False
