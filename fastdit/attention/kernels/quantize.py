"""Definition of the low precisions. ``reference`` uses these functions, and every kernel is tested against it.

``"int8"``: products of queries and keys.

1. The mean of all real keys of a sample and head is taken off the keys. A softmax does not notice: each row's logits
   fall by the same ``q . mean * scale``, which is added to its log-sum-exp again, from unquantised q.
2. Queries and smoothed keys become int8, with one scale for each query block and each key block of the mask.
3. A logit is the integer product times both scales times the softmax scale. Exponentials, sums and the products of
   probabilities and values are in the precision of the inputs, summed in fp32.

``"int8_fp8"``: products of probabilities and values too.

4. Values become float8 e4m3, with one scale for each sample, head and channel.
5. Probabilities, as ``exp(logit - largest logit of the row)`` in [0, 1], times 448, become e4m3. The sum that they
   are divided by is that of the unrounded ones. A kernel that does not know a row's largest logit beforehand takes
   the largest so far.

Means of skipped blocks (``means.py``) are those of the smoothed keys and of the values, and are not quantised:
neither they, nor the queries that they meet, nor their probabilities. The row's largest logit counts theirs.

Means, scales and quotients are computed in fp32, fp64 for fp64 inputs. Rounding is to nearest, half to even.

Source: SageAttention (arXiv 2410.02367), SageAttention2 (arXiv 2411.10958).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...mask import BlockMask
from .means import block_means
from .options import E4M3_MAX, INT8_MAX


def smooth_keys(k: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Subtract the mean of all real keys from the keys.

    Args:
        k: ``(B, H, Sk, D)`` keys; padding may hold anything finite.
        mask: The blocks.

    Returns:
        The smoothed keys, ``(B, H, Sk, D)`` fp32 or fp64, and the mean, ``(B, H, 1, D)``, likewise.
    """
    sizes = mask.lengths_k[..., None]
    mean = (block_means(k, mask) * sizes).sum(2, keepdim=True) / sizes.sum(2, keepdim=True).clamp(min=1)
    return k - mean, mean


def quantize_blocks(x: Tensor, lengths: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Round blocks of tokens to int8, each by a scale of its own: the largest magnitude of its real tokens / 127.

    Args:
        x: ``(B, H, S, D)`` fp32 or fp64.
        lengths: ``(B or 1, H or 1, N)`` real tokens of each block, in [0, block].
        block: Tokens in a block.

    Returns:
        ``(B, H, S, D)`` int8, 0 for padding, and the scales, ``(B, H, N)`` in the dtype of ``x``, 1 where all is 0.
    """
    blocks = pad(x, (0, 0, 0, lengths.shape[-1] * block - x.shape[2])).unflatten(2, (-1, block))
    padding = torch.arange(block, device=x.device) >= lengths[..., None]
    blocks = blocks.masked_fill(padding[..., None], 0)
    largest = blocks.abs().amax((3, 4))
    scales = torch.where(largest > 0, largest / INT8_MAX, 1)
    rounded = (blocks / scales[..., None, None]).round().to(torch.int8)
    return rounded.flatten(2, 3)[:, :, : x.shape[2]], scales


def int8_products(q: Tensor, k: Tensor, mask: BlockMask) -> Tensor:
    """Multiply quantised queries with quantised keys: ``(B, H, Sq, Sk)`` in the dtype of ``q``.

    Args:
        q: ``(B, H, Sq, D)`` queries, fp32 or fp64.
        k: ``(B, H, Sk, D)`` smoothed keys, likewise.
        mask: The blocks.
    """
    q8, q_scales = quantize_blocks(q, mask.lengths_q, mask.block_q)
    k8, k_scales = quantize_blocks(k, mask.lengths_k, mask.block_k)
    products = q8.to(q.dtype) @ k8.to(q.dtype).mT  # integers below 2**24 for head dims up to 1040: exact
    scales = q_scales[..., None] * k_scales[:, :, None]
    scales = scales.repeat_interleave(mask.block_q, 2).repeat_interleave(mask.block_k, 3)
    return products * scales[:, :, : q.shape[2], : k.shape[2]]


def quantize_channels(v: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Round values to e4m3, each channel by a scale of its own: the largest magnitude of its real values / 448.

    Args:
        v: ``(B, H, Sk, D)`` values, fp32 or fp64; padding may hold anything finite.
        mask: The blocks.

    Returns:
        ``(B, H, Sk, D)`` float8_e4m3fn, 0 for padding, and the scales, ``(B, H, 1, D)`` in the dtype of ``v``, 1 where
        all is 0.
    """
    padding = (torch.arange(mask.block_k, device=v.device) >= mask.lengths_k[..., None]).flatten(2)
    v = v.masked_fill(padding[..., : v.shape[2], None], 0)
    largest = v.abs().amax(2, keepdim=True)
    scales = torch.where(largest > 0, largest / E4M3_MAX, 1)
    return (v / scales).to(torch.float8_e4m3fn), scales


def round_weights(weights: Tensor) -> Tensor:
    """Round unnormalised probabilities to e4m3 at 448 times their size, and scale them back.

    Args:
        weights: ``(..., Sk)`` in [0, 1], fp32 or fp64.

    Returns:
        ``(..., Sk)``, likewise.
    """
    return (weights * E4M3_MAX).to(torch.float8_e4m3fn).to(weights.dtype) / E4M3_MAX
