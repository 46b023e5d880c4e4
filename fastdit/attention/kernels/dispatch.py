"""Kernel entry point: ``block_sparse_attention`` checks a call, chooses a kernel and runs it.

A kernel is a module in this package whose name is in one of the two tuples below, with these functions:

- ``available()``: the reason why it cannot run on this machine, or ``None``.
- ``check(q, k, v, mask, options)``: the reason why it cannot run for a call, or ``None``. It refuses every option of
  ``options.py`` that it does not support.
- ``run(q, k, v, mask, options)``: the output, ``(B, H, Sq, D)`` in the dtype of ``q``, and the natural log-sum-exp of
  each row, ``(B, H, Sq)`` fp32, or fp64 for fp64 inputs. A row without keys is 0 and -inf.
- ``no_gain(q, options)``, optional: the reason why low precision runs but is not faster, or ``None``.

``q`` is ``(B, H, Sq, D)``, ``k`` and ``v`` are ``(B, H, Sk, D)``; ``mask`` lists the blocks.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ...mask import BlockMask
from .checks import check_index, check_lists, lists_are_checked
from .options import PRECISIONS, Options

_AUTOMATIC = ("triton", "cpu")
_ON_REQUEST = ("fa4", "reference")
_MODULES = {"triton": "triton.kernel", "cpu": "cpu.kernel"}


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    kernel: str | None = None,
    compensate: str | None = None,
    precision: str | None = None,
    variant: str | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the attention of listed blocks.

    Gradients flow through the output to q, k and v; the log-sum-exp carries them only with ``kernel="reference"``.
    Rows of padding queries hold finite numbers without meaning. The lists of the mask and the index are trusted,
    unless the environment says ``FASTDIT_CHECK_LISTS=1``.

    Args:
        q: ``(B, H, Sq, D)`` queries, in the order of the mask, last axis contiguous.
        k: ``(B, H, Sk, D)`` keys, likewise.
        v: ``(B, H, Sk, D)`` values, likewise.
        mask: The blocks. Its batch and head axes are 1 or those of ``q``. Keys and values that are padding never
            count, but must be finite.
        scale: Softmax scale; default ``D ** -0.5``.
        kernel: One of ``list_kernels()``; default: the fastest that can run, never ``"reference"``.
        compensate: ``"mean"``: each block that is not listed counts as one key, the mean of its real keys, with the
            weight of as many, and with their mean value, also in rows that list nothing. Default: it is left out.
        precision: ``"int8"`` or ``"int8_fp8"`` for products in low precision, as ``quantize.py`` defines them, without
            gradients; default: that of the inputs. It gains little at head dims up to 64, where exponentials take as
            long as products.
        variant: How the kernel reads full blocks, for tests and tuning: one of ``options.VARIANTS``; default: what its
            table says.
        index: ``(1 or H, n)`` int64: the token at each position of the mask's sequence, -1 for padding. q, k and v are
            then in another order, of one length that need not be n, and are gathered where they are read, so that no
            copies in order are made; only kernels in low precision and ``"reference"`` do so. Default: q, k and v are
            in the order of the mask.

    Returns:
        The output, ``(B, H, Sq, D)`` in the dtype of ``q``, and the log-sum-exp of each row in natural log,
        ``(B, H, Sq)``, fp32 (fp64 for fp64 inputs), both in the order of the mask: with an index Sq is n. A row without
        keys is 0 and -inf.

    Raises:
        ValueError: Shapes, devices or the mask do not fit each other, or there is no such kernel or option.
        TypeError: Dtypes differ or are not floating point.
        RuntimeError: No kernel, or not the one asked for, can run; the message says why.
    """
    check_inputs(q, k, v, mask, index)
    if lists_are_checked():
        check_lists(mask)
        if index is not None:
            check_index(index, mask, q.shape[2])
    options = Options(q.shape[-1] ** -0.5 if scale is None else scale, compensate, precision, variant, index)
    return _module(_choose(q, k, v, mask, options, kernel)).run(q, k, v, mask, options)


def choose_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    kernel: str | None = None,
    *,
    compensate: str | None = None,
    precision: str | None = None,
) -> str:
    """Name the kernel that ``block_sparse_attention`` runs for these arguments.

    Arguments as for ``block_sparse_attention``.

    Raises:
        ValueError: Shapes, devices or the mask do not fit each other, or there is no such kernel or option.
        TypeError: Dtypes differ or are not floating point.
        RuntimeError: No kernel, or not the one asked for, can run; the message says why.
    """
    check_inputs(q, k, v, mask)
    return _choose(q, k, v, mask, Options(q.shape[-1] ** -0.5, compensate, precision), kernel)


def low_precision_reason(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    kernel: str | None = None,
    *,
    compensate: str | None = None,
    precision: str,
) -> str | None:
    """Say why a call had better run in the precision of its inputs than in a low one, or return ``None``.

    Nothing is read but shapes, dtypes and devices. Arguments as for ``block_sparse_attention``.

    Raises:
        ValueError: There is no such kernel or option.
        RuntimeError: No kernel, or not the one asked for, can run in any precision; the message says why.
    """
    options = Options(q.shape[-1] ** -0.5, compensate, precision)
    otherwise = _choose(q, k, v, mask, replace(options, precision=None), kernel)
    for name in _AUTOMATIC if kernel is None else (kernel,):
        if _reason(name, q, k, v, mask, options) is None:
            no_gain = getattr(_module(name), "no_gain", None)
            return None if no_gain is None else no_gain(q, options)
    return _reason(otherwise, q, k, v, mask, options)


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    kernel: str | None = None,
    precision: str | None = None,
) -> None:
    """Check what a call brings with it, before blocks are chosen.

    Arguments as for ``block_sparse_attention``.

    Raises:
        ValueError: Shapes or devices do not fit each other, the scale is not finite, or there is no such kernel or
            precision.
        TypeError: Dtypes differ or are not floating point.
    """
    check_tensors(q, k, v)
    Options(1.0 if scale is None else scale, None, precision)
    _check_name(kernel)


def list_kernels() -> tuple[str, ...]:
    """List the names of all kernels: those chosen automatically, best first, then those only run on request."""
    return _AUTOMATIC + _ON_REQUEST


def list_precisions() -> tuple[str, ...]:
    """List the low precisions that products can be computed in, the more exact first."""
    return PRECISIONS


def explain_kernels(
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    mask: BlockMask | None = None,
    *,
    compensate: str | None = None,
    precision: str | None = None,
) -> dict[str, str | None]:
    """Say for each kernel why it cannot run, ``None`` where it can.

    Without tensors the answer is about this machine, with all of them about that call.
    Arguments as for ``block_sparse_attention``.

    Raises:
        ValueError: Only some arguments are given, they do not fit each other, or there is no such option.
        TypeError: Dtypes differ or are not floating point.
    """
    if q is None and k is None and v is None and mask is None:
        return {name: _module(name).available() for name in list_kernels()}
    if q is None or k is None or v is None or mask is None:
        raise ValueError("give q, k, v and mask, or none of them")
    check_inputs(q, k, v, mask)
    options = Options(q.shape[-1] ** -0.5, compensate, precision)
    return {name: _reason(name, q, k, v, mask, options) for name in list_kernels()}


def check_inputs(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, index: Tensor | None = None) -> None:
    """Check that tensors and mask fit each other, before anything is computed.

    Arguments as for ``block_sparse_attention``.

    Raises:
        ValueError: Shapes, devices or the mask do not fit each other.
        TypeError: Dtypes differ or are not floating point.
    """
    if not q.device == k.device == v.device == mask.device:
        raise ValueError(
            "q, k, v and mask must be on one device, got "
            f"{q.device}, {k.device}, {v.device}, {mask.device}; see mask.to(device)"
        )
    check_tensors(q, k, v)
    tokens_q, tokens_k = q.shape[2], k.shape[2]
    if index is not None:
        _check_index_shape(index, q, k)
        tokens_q = tokens_k = index.shape[1]
    for side, tokens, num, block in (
        ("queries", tokens_q, mask.num_q, mask.block_q),
        ("keys", tokens_k, mask.num_k, mask.block_k),
    ):
        if math.ceil(tokens / block) != num:
            raise ValueError(
                f"the mask has {num} blocks of {block} {side}, which is {(num - 1) * block + 1} to {num * block} "
                f"{side}, got {tokens}; build the mask for the padded sequence"
            )
    for name in ("indices", "lengths_q", "lengths_k"):
        batch, heads = getattr(mask, name).shape[:2]
        if batch not in (1, q.shape[0]) or heads not in (1, q.shape[1]):
            raise ValueError(
                f"mask.{name} is for batch {batch} and {heads} heads; "
                f"batch must be 1 or {q.shape[0]}, heads 1 or {q.shape[1]}"
            )
    tail = tokens_k - (mask.num_k - 1) * mask.block_k
    # On a GPU this would synchronise at every call, so the mask is trusted there.
    if tail < mask.block_k and mask.device.type == "cpu" and int(mask.lengths_k[..., -1].max()) > tail:
        raise ValueError(
            f"the last key block of the mask holds {int(mask.lengths_k[..., -1].max())} keys, but k ends after "
            f"{tail} of it; build the mask with tokens_k={tokens_k}"
        )


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check that queries, keys and values fit each other.

    Arguments as for ``block_sparse_attention``.

    Raises:
        ValueError: Shapes or devices do not fit each other.
        TypeError: Dtypes differ or are not floating point.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must be (B, H, S, D), got {shapes}")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must agree in B, H and D, and k and v in S, got {shapes}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q, k and v must not be empty, got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them first")
    if not q.is_floating_point():
        raise TypeError(f"q, k and v must be floating point, got {q.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")


def _check_index_shape(index: Tensor, q: Tensor, k: Tensor) -> None:
    if index.ndim != 2 or index.shape[0] not in (1, q.shape[1]) or index.dtype != torch.int64:
        raise ValueError(
            f"index must be (1 or H, n) int64 with H = {q.shape[1]}, got {tuple(index.shape)} {index.dtype}"
        )
    if index.device != q.device:
        raise ValueError(f"index must be on the device of q, {q.device}, got {index.device}; see index.to(device)")
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"an index orders queries and keys alike, so they must be as many, got {q.shape[2]} and {k.shape[2]}"
        )


def _check_name(kernel: str | None) -> None:
    if kernel not in (None, *list_kernels()):
        raise ValueError(f"unknown kernel {kernel!r}; kernels are: {', '.join(list_kernels())}")


def _choose(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options, kernel: str | None) -> str:
    _check_name(kernel)
    if kernel is not None:
        reason = _reason(kernel, q, k, v, mask, options)
        if reason is not None:
            raise RuntimeError(f"kernel {kernel!r} cannot run: {reason}")
        return kernel
    reasons = {}
    for name in _AUTOMATIC:
        reasons[name] = _reason(name, q, k, v, mask, options)
        if reasons[name] is None:
            return name
    reasons["reference"] = _reason("reference", q, k, v, mask, options)
    if reasons["reference"] is None:
        reasons["reference"] = (
            "not chosen by itself, because it is slow and takes memory for the whole score matrix of a head; "
            "kernel='reference' runs it"
        )
    raise RuntimeError("no kernel can run. " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def _reason(name: str, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options) -> str | None:
    module = _module(name)
    if options.precision is not None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return f"precision={options.precision!r} has no backward; use torch.no_grad(), or leave precision out"
    return module.available() or module.check(q, k, v, mask, options)


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{_MODULES.get(name, name)}", __package__)
