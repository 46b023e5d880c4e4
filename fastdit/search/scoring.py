"""Errors, covered attention mass and density of sparse results, head by head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad

from ..attention import AttentionMethod, BlockMethod, MethodState, Pattern
from ..tokens import AttentionCall

RECALL_ROWS = 32
"""Sampled queries for the recall of a head."""

_TOKENS = 1024
_GOLDEN = 0.6180339887498949
_EYE = 64.0
_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Reference:
    """The dense output of one call, which others are compared with.

    Args:
        out: ``(B, H, S, D)``, in the model's own token order.
        call: The call.
        projection: ``(H, D, D)`` fp32, for each head the Gram matrix of its rows of the output projection.
        energy: ``(H,)`` fp32, squared norm of each head's output.
        projected_energy: Squared norm of the layer's output, all heads projected and added up; 0-d fp32.
    """

    out: Tensor
    call: AttentionCall
    projection: Tensor
    energy: Tensor
    projected_energy: Tensor

    @classmethod
    def of(cls, out: Tensor, call: AttentionCall, linear: Module) -> Reference:
        """Measure a dense output. Only video tokens count: what attends to text or is text may be projected elsewhere.

        Args:
            out: ``(B, H, S, D)``.
            call: The call.
            linear: The output projection, as ``ModelFamily.output_projection`` returns it.
        """
        video = out[:, :, call.tokens.video]
        energy = _grams(video).diagonal(dim1=1, dim2=2).sum(-1)
        return cls(out, call, head_grams(linear, out), energy, projected_energy(linear, video))

    def errors(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Measure how far another output is from the dense one.

        Args:
            out: ``(B, H, S, D)``.

        Returns:
            Two ``(H,)`` fp32: the norm of each head's error after the output projection, relative to the norm of the
            layer's output, and the norm of each head's error before it, relative to the norm of the head's output.
        """
        video = self.call.tokens.video
        grams = _grams(out[:, :, video], self.out[:, :, video])
        # rounding can leave a trace of nothing below zero
        projected = (grams * self.projection).sum((1, 2)).clamp(min=0) / self.projected_energy.clamp(min=_TINY)
        own = grams.diagonal(dim1=1, dim2=2).sum(-1) / self.energy.clamp(min=_TINY)
        return projected.sqrt(), own.sqrt()


def head_grams(linear: Module, like: Tensor) -> Tensor:
    """Return ``W W^T`` of each head's rows ``W`` of a projection, ``(H, D, D)`` fp32.

    The norm of ``X W`` is the root of ``trace(X^T X W W^T)``, so that no ``S x d_model`` tensor is needed. The rows are
    read by sending unit vectors through the layer: it may be quantised, offloaded, or have adapters.

    Args:
        linear: The projection; its first ``H * D`` inputs are the heads.
        like: ``(B, H, S, D)``, for sizes, dtype and device.
    """
    heads, dim = like.shape[1], like.shape[3]
    grams = torch.empty(heads, dim, dim, dtype=torch.float32, device=like.device)
    for head in range(heads):
        # large against the bias, whose rounding would show otherwise
        unit = torch.eye(dim, device=like.device, dtype=like.dtype) * _EYE
        rows = _project(linear, pad(unit, (head * dim, (heads - head - 1) * dim))).float() / _EYE
        grams[head] = rows @ rows.T
    return grams


def projected_energy(linear: Module, x: Tensor) -> Tensor:
    """Return the squared norm of an output after its projection, without the bias, 0-d fp32.

    Args:
        linear: The projection; its first ``H * D`` inputs are the heads.
        x: ``(B, H, S, D)``.
    """
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    for part in x.split(_TOKENS, dim=2):
        total += _project(linear, part.transpose(1, 2).flatten(2)).float().square().sum()
    return total


def sampled_recall(q: Tensor, k: Tensor, pattern: Pattern, call: AttentionCall, rows: int = RECALL_ROWS) -> Tensor:
    """Measure the attention mass that a pattern covers, as a mean over some video queries, ``(H,)`` fp32 in [0, 1].

    Args:
        q: ``(B, H, S, D)`` queries, in the model's own token order.
        k: ``(B, H, S, D)`` keys, likewise.
        pattern: The pattern.
        call: The call.
        rows: Queries to look at, at least 1, spread over the video.
    """
    mask, inverse = pattern.mask, pattern.layout.inverse
    sample = _sample(call, rows, q.device)
    recall = torch.empty(q.shape[1], dtype=torch.float32, device=q.device)
    for head in range(len(recall)):
        position = inverse[head if len(inverse) > 1 else 0]
        blocks = _listed(pattern, head, position[sample] // mask.block_q)
        kept = blocks[:, :, position // mask.block_k]
        recall[head] = (_attention(q, k, head, sample, call) * kept).sum(-1).mean()
    return recall


def frame_mass(q: Tensor, k: Tensor, call: AttentionCall, rows: int = RECALL_ROWS) -> Tensor:
    """Measure how attention is spread over the distance between frames, as a mean over some video queries.

    Args:
        q: ``(B, H, S, D)`` queries, in the model's own token order.
        k: ``(B, H, S, D)`` keys, likewise.
        call: The call.
        rows: Queries to look at, at least 1, spread over the video.

    Returns:
        ``(H, frames)`` fp32 in [0, 1]: the mass on video tokens of the same frame, of the next ones on either side, and
        so on. What is missing from 1 is on text.
    """
    grid, video = call.tokens.grid, call.tokens.video
    sample = _sample(call, rows, q.device)
    frame = (sample - video.start) // grid.frame_tokens
    apart = (frame[:, None] - torch.arange(grid.frames, device=q.device)).abs()
    mass = torch.zeros(q.shape[1], grid.frames, dtype=torch.float32, device=q.device)
    for head in range(len(mass)):
        by_frame = _attention(q, k, head, sample, call)[:, :, video].unflatten(-1, (grid.frames, -1)).sum(-1).mean(0)
        mass[head].index_add_(0, apart.flatten(), by_frame.flatten() / len(sample))
    return mass


@contextmanager
def naming(method: AttentionMethod) -> Iterator[None]:
    """Name a candidate in the error, if it cannot run.

    Args:
        method: The candidate.

    Raises:
        RuntimeError: It cannot.
        OutOfMemoryError: It could, with more memory.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise RuntimeError(f"candidate {method!r} cannot run on this model: {error}; leave it out") from error


def known_pattern(method: AttentionMethod, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Any:
    """Return the pattern that a method has just computed, or ``None`` where the result is not that of a pattern.

    Args:
        method: The method, whose ``forward`` has run.
        q: ``(B, H, S, D)`` queries of that call.
        k: ``(B, H, S, D)`` keys of that call.
        call: The call.
        state: The state that it ran with.
    """
    if method.static:
        return method.resolve(q, k, call, state) if type(method).forward is BlockMethod.forward else None
    return state.pattern


def head_density(pattern: Pattern | None, call: AttentionCall, state: MethodState, heads: int) -> Tensor:
    """Return the fraction of pairs that each head has computed, ``(H,)`` in [0, 1].

    Args:
        pattern: The pattern computed, or ``None``.
        call: The call.
        state: The state that the method ran with.
        heads: Heads, at least 1.

    Raises:
        ValueError: The method did not say what it computed.
    """
    if pattern is not None:
        return state.mask(pattern, call).kept_by_head.mean(0).float().expand(heads)
    if state.kept is None:
        raise ValueError("the method left no density in state.kept: its forward has to")
    return state.kept.float().expand(heads)


def _sample(call: AttentionCall, rows: int, device: torch.device) -> Tensor:
    """Pick queries of the video, ``(rows,)`` int64: steps of the golden ratio fall on all rows and columns."""
    video = call.tokens.video
    count = video.stop - video.start
    spread = (torch.arange(min(rows, count), dtype=torch.float64) * _GOLDEN) % 1
    sample = torch.arange(count) if rows >= count else (spread * count).long()
    return (sample + video.start).to(device)


def _attention(q: Tensor, k: Tensor, head: int, sample: Tensor, call: AttentionCall) -> Tensor:
    """Return the attention of some queries of a head to all keys, ``(B, rows, S)`` fp32."""
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = q[:, head, sample].float() @ k[:, head].float().mT * scale
    if call.key_padding is not None:
        scores = scores.masked_fill(call.key_padding[:, None], -torch.inf)
    return scores.softmax(-1)


def _listed(pattern: Pattern, head: int, query_blocks: Tensor) -> Tensor:
    mask = pattern.mask
    head = head if mask.indices.shape[1] > 1 else 0
    index, counts = mask.indices[:, head, query_blocks].long(), mask.counts[:, head, query_blocks, None]
    listed = torch.arange(index.shape[-1], device=index.device) < counts
    blocks = torch.zeros(*index.shape[:2], mask.num_k + 1, dtype=torch.bool, device=index.device)
    blocks.scatter_(2, torch.where(listed, index, mask.num_k), True)
    return blocks[..., : mask.num_k] | (counts == mask.num_k)


def _grams(x: Tensor, minus: Tensor | None = None) -> Tensor:
    grams = torch.empty(x.shape[1], x.shape[3], x.shape[3], dtype=torch.float32, device=x.device)
    for head in range(x.shape[1]):
        rows = x[:, head].float() if minus is None else x[:, head].float() - minus[:, head].float()
        rows = rows.flatten(0, 1)
        grams[head] = rows.T @ rows
    return grams


def _project(linear: Any, x: Tensor) -> Tensor:
    x = pad(x, (0, linear.in_features - x.shape[-1]))
    return linear(x) - linear(torch.zeros_like(x[..., :1, :]))
