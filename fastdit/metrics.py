"""Metrics against a reference: attention recall, relative errors, PSNR and SSIM of videos."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def recall(
    q: Tensor,
    k: Tensor,
    blocks: Tensor,
    *,
    block_q: int,
    block_k: int,
    lengths_q: Tensor | None = None,
    lengths_k: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the attention mass that the computed blocks cover, averaged over real query rows.

    One query block is looked at a time, so no ``Sq x Sk`` matrix is ever held.

    Args:
        q: ``(B, H, Sq, D)`` queries, in the order of the blocks.
        k: ``(B, H, Sk, D)`` keys, likewise.
        blocks: ``(B or 1, H or 1, Nq, Nk)`` bool, True where a block is computed.
        block_q: Queries in a block, at least 1.
        block_k: Keys in a block, at least 1.
        lengths_q: ``(B or 1, H or 1, Nq)`` real queries in each block; default: all of ``q`` are real.
        lengths_k: ``(B or 1, H or 1, Nk)`` real keys in each block; default: all of ``k`` are real.
        scale: Softmax scale; default ``D ** -0.5``.

    Returns:
        ``(B, H)`` fp32 in [0, 1].

    Raises:
        ValueError: The block map does not fit the number of queries or keys.
    """
    for side, tokens, num, block in (("q", q, blocks.shape[-2], block_q), ("k", k, blocks.shape[-1], block_k)):
        if not (num - 1) * block < tokens.shape[2] <= num * block:
            raise ValueError(
                f"{num} blocks of {block} do not fit {side} of {tuple(tokens.shape)}: "
                f"its third axis must be in [{(num - 1) * block + 1}, {num * block}]"
            )
    batch, heads, num_queries, head_dim = q.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    k = k.float()
    kept_keys = blocks.repeat_interleave(block_k, -1)[..., : k.shape[2]]
    real_keys = _real(lengths_k, block_k, k)
    real_queries = _real(lengths_q, block_q, q)
    mass = torch.zeros(batch, heads, dtype=torch.float32, device=q.device)
    for i, start in enumerate(range(0, num_queries, block_q)):
        rows = slice(start, start + block_q)
        scores = (q[:, :, rows].float() @ k.transpose(-1, -2)) * scale
        weights = scores.masked_fill(~real_keys[:, :, None], -math.inf).softmax(-1)
        covered = (weights * kept_keys[:, :, i, None]).sum(-1)
        mass += covered.masked_fill(~real_queries[:, :, rows], 0).sum(-1)
    return mass / real_queries.sum(-1).clamp(min=1)


def relative_l1(x: Tensor, reference: Tensor, *, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Return ``|x - reference|.sum() / |reference|.sum()``, fp32, at least 0.

    Args:
        x: ``(...)``, any float dtype.
        reference: ``(...)`` of the same shape.
        dim: Axes to sum over; default all, which gives a 0-d tensor.

    Raises:
        ValueError: The shapes differ.
    """
    x, reference = _pair(x, reference)
    dims = tuple(range(x.ndim)) if dim is None else dim
    return (x - reference).abs().sum(dims) / reference.abs().sum(dims)


def relative_l2(x: Tensor, reference: Tensor, *, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Return ``norm(x - reference) / norm(reference)``, fp32, at least 0.

    Args:
        x: ``(...)``, any float dtype.
        reference: ``(...)`` of the same shape.
        dim: Axes the norms run over; default all, which gives a 0-d tensor.

    Raises:
        ValueError: The shapes differ.
    """
    x, reference = _pair(x, reference)
    return torch.linalg.vector_norm(x - reference, dim=dim) / torch.linalg.vector_norm(reference, dim=dim)


def psnr(video: Tensor, reference: Tensor, *, per_frame: bool = False) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, of the mean squared error over all frames; higher is closer.

    Args:
        video: ``(F, H, W, C)`` in [0, 1].
        reference: ``(F, H, W, C)`` in [0, 1].
        per_frame: Whether to return one value for each frame.

    Returns:
        0-d, or ``(F,)``; inf for identical videos.

    Raises:
        ValueError: A shape is wrong or the shapes differ.
    """
    video, reference = _videos(video, reference)
    error = torch.stack([(a.double() - b.double()).square().mean() for a, b in zip(video, reference, strict=True)])
    return -10 * torch.log10(error if per_frame else error.mean())


def mean_psnr(values: Iterable[float]) -> float:
    """Return the PSNR in dB of the mean squared error of several videos of equal length.

    Args:
        values: PSNR of each video in dB, inf for identical videos; at least one.
    """
    error = fmean(10 ** (-value / 10) for value in values)
    return -10 * math.log10(error) if error else math.inf


def ssim(video: Tensor, reference: Tensor, *, per_frame: bool = False) -> Tensor:
    """Return the structural similarity, in [-1, 1]; 1 is identical.

    Each frame and channel is compared in Gaussian windows of 11 x 11 with sigma 1.5, as Wang et al. (2004) do,
    and as scikit-image does with ``gaussian_weights=True, use_sample_covariance=False, data_range=1``.

    Args:
        video: ``(F, H, W, C)`` in [0, 1], ``H`` and ``W`` at least 11.
        reference: ``(F, H, W, C)`` in [0, 1].
        per_frame: Whether to return one value for each frame instead of their mean.

    Returns:
        0-d, or ``(F,)``.

    Raises:
        ValueError: A shape is wrong, the shapes differ, or a frame is smaller than the window.
    """
    video, reference = _videos(video, reference)
    if min(video.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM looks at windows of {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got frames of "
            f"{video.shape[1]} x {video.shape[2]}; use psnr for frames this small"
        )
    values = torch.stack([_frame_ssim(a.double(), b.double()) for a, b in zip(video, reference, strict=True)])
    return values if per_frame else values.mean()


def _frame_ssim(a: Tensor, b: Tensor) -> Tensor:
    offsets = torch.arange(SSIM_WINDOW, device=a.device, dtype=a.dtype) - SSIM_WINDOW // 2
    line = torch.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    line = line / line.sum()

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    a, b = a.permute(2, 0, 1)[:, None], b.permute(2, 0, 1)[:, None]
    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).mean()


def _real(lengths: Tensor | None, block: int, x: Tensor) -> Tensor:
    if lengths is None:
        return torch.ones(1, 1, x.shape[2], dtype=torch.bool, device=x.device)
    offsets = torch.arange(block, device=x.device)
    return (offsets < lengths.to(x.device)[..., None]).flatten(2)[..., : x.shape[2]]


def _pair(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape != reference.shape:
        raise ValueError(f"both tensors must have one shape, got {tuple(x.shape)} and {tuple(reference.shape)}")
    return x.float(), reference.float()


def _videos(video: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if video.shape != reference.shape or video.ndim != 4 or 0 in video.shape:
        raise ValueError(
            "both videos must be (F, H, W, C) of one shape and not empty, "
            f"got {tuple(video.shape)} and {tuple(reference.shape)}"
        )
    return video, reference
