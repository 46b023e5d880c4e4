"""Attention implementations that are compared, dense or block-sparse, and why some cannot run here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...attention.kernels.dispatch import block_sparse_attention, choose_kernel, list_kernels, list_precisions
from ...mask import BlockMask

Run = Callable[[], Tensor]
"""Computes the attention once and returns it: ``(B, H, S, D)``. Only this is timed."""

Prepare = Callable[[Tensor, Tensor, Tensor, BlockMask], Run]
"""From queries, keys and values, ``(B, H, S, D)`` each, and the blocks to a run; may convert, compile and plan."""

MATH_TOKENS = 16384
"""Longest sequence for which attention that holds all scores is tried."""


class Unavailable(Exception):
    """A contender cannot run here; the message says why."""


class Broken(Exception):
    """One of our kernels failed though its check accepted the call."""


@dataclass(frozen=True)
class Contender:
    """One implementation of attention.

    Args:
        name: As rows and tables say it.
        sparse: Whether it computes the listed blocks; otherwise it computes all.
        prepare: Makes its run.
        package: Distribution that it comes from, for its version; ``None`` if that is torch or fastdit.
        exact: Whether its products are of the precision of the inputs.
        ours: Whether it is fastdit's own, which has to run where it does not refuse to.
    """

    name: str
    sparse: bool
    prepare: Prepare
    package: str | None = None
    exact: bool = True
    ours: bool = False

    @property
    def version(self) -> str | None:
        """Return the version of its package, ``None`` if there is none or it is not installed."""
        if self.package is None:
            return None
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def contenders() -> list[Contender]:
    """List all contenders, installed or not: dense, block-sparse, and our own kernels."""
    backends = (
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("math", SDPBackend.MATH),
    )
    others = (
        Contender("xformers", False, partial(_imported, "xformers.ops", "memory_efficient_attention"), "xformers"),
        Contender("fa2", False, partial(_imported, "flash_attn", "flash_attn_func"), "flash-attn"),
        Contender("fa3", False, partial(_imported, "flash_attn_interface", "flash_attn_func"), "flash-attn-3"),
        Contender("fa4", False, partial(_imported, "flash_attn.cute", "flash_attn_func"), "flash-attn-4"),
        Contender("flashinfer", False, _flashinfer, "flashinfer-python"),
        Contender("natten", False, partial(_imported, "natten.functional", "attention"), "natten"),
        Contender("flex-dense", False, partial(_flex, False)),
        Contender("flex", True, partial(_flex, True)),
        Contender("flashinfer-sparse", True, _flashinfer_sparse, "flashinfer-python"),
        Contender("sparge", True, _sparge, "spas-sage-attn", exact=False),
    )
    kernels = [name for name in list_kernels() if name != "reference"]
    ours = [Contender(f"fastdit-{name}", True, partial(_ours, name, None), ours=True) for name in kernels]
    low = [
        Contender(f"fastdit-{name}-{precision}", True, partial(_ours, name, precision), exact=False, ours=True)
        for name in kernels
        for precision in list_precisions()
    ]
    return [*(Contender(f"sdpa-{n}", False, partial(_sdpa, n, b)) for n, b in backends), *others, *ours, *low]


def prepare(contender: Contender, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> tuple[Run, Tensor]:
    """Make the run of a contender, and its first result; dense contenders ignore the mask.

    Arguments as for ``block_sparse_attention``.

    Args:
        contender: The contender.

    Returns:
        The run, and its output, ``(B, H, S, D)``.

    Raises:
        Unavailable: It is not installed, or refuses this call.
        Broken: It is ours, and neither refused nor ran.
    """
    try:
        run = contender.prepare(q, k, v, mask)
        return run, run()
    except Unavailable:
        raise
    except Exception as error:
        if contender.ours:
            raise Broken(failure(error)) from error
        raise Unavailable(_foreign(error)) from error


def failure(error: Exception) -> str:
    """Return the error as one line.

    Args:
        error: The error.
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no reason given'}"


def _foreign(error: Exception) -> str:
    # whatever a foreign kernel raises for a device, dtype or size that it was not built for
    return f"not installed: {str(error).splitlines()[0]}" if isinstance(error, ImportError) else failure(error)


def _ours(kernel: str, precision: str | None, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Run:
    try:
        choose_kernel(q, k, v, mask, kernel, precision=precision)
    except RuntimeError as error:
        raise Unavailable(str(error)) from error
    return lambda: block_sparse_attention(q, k, v, mask, kernel=kernel, precision=precision)[0]


def _sdpa(name: str, backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Run:
    if name == "math" and q.shape[2] > MATH_TOKENS:
        raise Unavailable(f"it holds all scores: more than {MATH_TOKENS} tokens are not tried")
    if name in ("cudnn", "efficient") and q.device.type != "cuda":
        raise Unavailable("it needs a CUDA device")

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def _swapped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lay tensors out as ``(B, S, H, D)``, outside of what is timed."""
    return tuple(x.transpose(1, 2).contiguous() for x in (q, k, v))  # type: ignore[return-value]


def _needs_cuda(q: Tensor) -> None:
    if q.device.type != "cuda":
        raise Unavailable("it needs a CUDA device")


def _imported(module: str, name: str, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Run:
    """Run a dense function of a package that takes ``(B, S, H, D)``."""
    attention = getattr(importlib.import_module(module), name)
    _needs_cuda(q)
    a, b, c = _swapped(q, k, v)

    def run() -> Tensor:
        out: Any = attention(a, b, c)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def _flashinfer(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Run:
    attention = importlib.import_module("flashinfer").single_prefill_with_kv_cache
    _needs_cuda(q)
    if q.shape[0] != 1:
        raise Unavailable("it takes one sample at a time")
    a, b, c = (x[0] for x in _swapped(q, k, v))
    return lambda: attention(a, b, c).transpose(0, 1)[None]


def _flex(sparse: bool, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Run:
    from torch.nn.attention.flex_attention import flex_attention

    if q.device.type != "cuda":
        raise Unavailable("its C++ takes minutes to compile; it is timed on CUDA devices")
    blocks = flex_mask(mask, q.shape[2], k.shape[2]) if sparse else None
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=blocks)


def flex_mask(mask: BlockMask, tokens_q: int, tokens_k: int) -> Any:
    """Convert a mask for FlexAttention: full blocks without a mask function, ragged ones with one.

    Args:
        mask: The blocks.
        tokens_q: Queries, padding included.
        tokens_k: Keys, padding included.
    """
    from torch.nn.attention.flex_attention import BlockMask as FlexMask

    listed, ragged = mask.to_dense(), mask.ragged_blocks
    lengths, block = mask.lengths_k, mask.block_k

    def real(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return _at(listed, b, h, i // mask.block_q, j // block) & (j % block < _at(lengths, b, h, j // block))

    def lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.sort(blocks.int(), dim=-1, descending=True, stable=True).indices
        return blocks.sum(-1, dtype=torch.int32), order.int()

    partial_counts, partial_lists = lists(listed & ragged)
    full_counts, full_lists = lists(listed & ~ragged)
    return FlexMask.from_kv_blocks(
        partial_counts,
        partial_lists,
        full_counts,
        full_lists,
        BLOCK_SIZE=(mask.block_q, mask.block_k),
        mask_mod=real,
        seq_lengths=(tokens_q, tokens_k),
        compute_q_blocks=False,
    )


def _at(x: Tensor, b: Tensor, h: Tensor, *where: Tensor) -> Tensor:
    return x[(b if x.shape[0] > 1 else 0 * b, h if x.shape[1] > 1 else 0 * h, *where)]


def _flashinfer_sparse(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Run:
    wrapper_class = importlib.import_module("flashinfer").VariableBlockSparseAttentionWrapper
    _needs_cuda(q)
    if q.shape[0] != 1:
        raise Unavailable("it takes one sample at a time")
    heads, dim = q.shape[1], q.shape[3]
    wrapper = wrapper_class(torch.empty(128 << 20, dtype=torch.uint8, device=q.device), backend="auto")
    rows, columns = (x.expand(1, heads, -1)[0].contiguous() for x in (mask.lengths_q, mask.lengths_k))
    blocks = mask.to_dense().expand(1, heads, -1, -1)[0].contiguous()
    wrapper.plan(blocks, rows, columns, heads, heads, dim, q_data_type=q.dtype)
    a, b, c = (x[0].contiguous() for x in (q, k, v))
    return lambda: wrapper.run(a, b, c)[None]


def _sparge(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Run:
    attention = importlib.import_module("spas_sage_attn").block_sparse_sage2_attn_cuda
    _needs_cuda(q)
    if (mask.block_q, mask.block_k) != (128, 64):
        raise Unavailable(f"its blocks are 128 x 64, the mask has {mask.block_q} x {mask.block_k}")
    if q.shape[2] % mask.block_q or k.shape[2] % mask.block_k:
        raise Unavailable("it does not support ragged blocks")
    blocks = mask.to_dense().expand(*q.shape[:2], -1, -1).to(torch.int8).contiguous()
    return lambda: attention(q, k, v, mask_id=blocks)
