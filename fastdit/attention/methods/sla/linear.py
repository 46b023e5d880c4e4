"""Linear attention over listed blocks: each query block has a state of its own, the sum over its key blocks.

With features ``f``, the output of query ``i`` is ``f(q_i) H / (f(q_i) z)``, where ``H`` adds up ``f(k_j)^T v_j`` and
``z`` adds up ``f(k_j)`` over the real keys of its blocks. So each key block is summed once, and a product with the map
of blocks gives the states of all query blocks. Source: SLA (arXiv 2509.24006), section 4.

On NVIDIA GPUs it runs in the kernels of ``kernels/triton/linear``, elsewhere in what is defined here. There, without
gradients, the kernel of the output also joins it to the exact part, so that neither it nor its projection is in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import InitVar, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .features import feature_map

_STATE_BYTES = 256 << 20  # states of the heads that run at once; one head always runs


def choose_linear(q: Tensor, v: Tensor, block: int, kernel: str | None = None, *, gradients: bool = True) -> str:
    """Name what computes linear attention: ``"fused"``, ``"triton"`` or ``"eager"``.

    ``"fused"`` is Triton too, and joins the result to the exact part: ``join_linear_attention``. On a GPU a warning
    says why not Triton.

    Args:
        q: ``(B, H, S, E)`` queries or their features.
        v: ``(B, H, S, D)`` values.
        block: Tokens per block, at least 1.
        kernel: Name of the kernel that the exact part was asked to run, or ``None``: with ``"cpu"`` and ``"reference"``
            linear attention is eager too.
        gradients: Whether gradients of anything are wanted, which the fused kernel does not have.
    """
    from ...kernels.triton.linear.tiles import linear_reason

    if kernel in ("cpu", "reference"):
        return "eager"
    reason = linear_reason(q, v, block)
    if reason is not None and v.is_cuda:
        warnings.warn(f"linear attention runs without Triton: {reason}", stacklevel=2)
    if reason is not None:
        return "eager"
    return "triton" if gradients else "fused"


@torch.library.custom_op("fastdit::linear_attention", mutates_args=())
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    lengths: Tensor,
    block: int,
    features: str = "given",
    kernel: str = "eager",
) -> Tensor:
    """Compute linear attention over listed blocks, a few heads at a time, in fp32 or better.

    Only the inputs are kept for the backward, which computes features and states again.

    Args:
        q: ``(B, H, S, E)`` queries, or features of them that are at least 0.
        k: ``(B, H, S, E)`` keys, or features of them that are at least 0; padding may hold anything.
        v: ``(B, H, S, D)`` values; padding must be finite.
        blocks: ``(B or 1, H or 1, N, N)`` bool, the key blocks of each query block; ``None`` for all.
        lengths: ``(B or 1, H or 1, N)`` int32, real keys of each block, the first ones in it.
        block: Tokens per block, at least 1.
        features: A map of ``feature_map`` for queries and keys; ``"given"`` if they are features already.
        kernel: ``"triton"`` or ``"eager"``.

    Returns:
        ``(B, H, S, D)`` in the dtype of ``v``; 0 for queries without keys, or with features that meet none of theirs.
    """
    if kernel == "triton":
        from ...kernels.triton.linear.linear import Listed, linear_fwd

        return linear_fwd(q, k, v, Listed(blocks, lengths, block, features))
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    with torch.autocast(v.device.type, enabled=False):
        for part in _parts(q, k, v, blocks, lengths, block, features):
            out[part.at] = part.join(_divide(part.q @ part.states())[0], v)
    return out


@linear_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastdit::linear_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    lengths: Tensor,
    block: int,
    features: str,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if kernel == "triton":
        from ...kernels.triton.linear.linear import Listed, linear_bwd

        return linear_bwd(grad, q, k, v, Listed(blocks, lengths, block, features))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    with torch.autocast(v.device.type, enabled=False):
        for part in _parts(q, k, v, blocks, lengths, block, features):
            states = part.states()
            out, weight = _divide(part.q @ states)
            of_sums = part.cut(grad[part.at]) * weight
            of_sums = torch.cat([of_sums, -(of_sums * out).sum(-1, keepdim=True)], -1)
            dq[part.at] = part.join(part.before_features(q, part.q, of_sums @ states.mT), q)
            of_keys = part.spread(part.q.mT @ of_sums)
            df = (part.v @ of_keys.mT).masked_fill(~part.real, 0)
            dk[part.at] = part.join(part.before_features(k, part.k, df), k)
            dv[part.at] = part.join((part.k @ of_keys)[..., :-1], v)
    return dq, dk, dv


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.how = inputs[5:]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, *ctx.how), *[None] * 5


linear_attention.register_autograd(_gradients, setup_context=_keep)


@torch.library.custom_op("fastdit::join_linear_attention", mutates_args=())
def join_linear_attention(
    exact: Tensor,
    share: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    lengths: Tensor,
    block: int,
    features: str,
) -> Tensor:
    """Compute ``exact + share * (linear W^T + b)`` in Triton, where ``linear`` is ``linear_attention`` of the rest.

    The sum is made in fp32 and rounded once. There are no gradients. Arguments as for ``linear_attention``.

    Args:
        exact: ``(B, H, S, D)`` output of the exact part.
        share: ``(B or 1, H or 1, N)`` share of each query block, bool or in [0, 1]; ``None`` for 1.
        weight: ``(D, D)`` projection ``W``, contiguous; ``None`` for a mix, ``exact + share * (linear - exact)``.
        bias: ``(D,)`` its ``b``, contiguous; ``None`` without a weight.

    Returns:
        ``(B, H, S, D)`` in the dtype of ``exact``.
    """
    from ...kernels.triton.linear.linear import Listed, linear_fwd
    from ...kernels.triton.linear.tokens import Join

    return linear_fwd(q, k, v, Listed(blocks, lengths, block, features), Join(exact, share, weight, bias))


@join_linear_attention.register_fake
def _(exact: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(exact, memory_format=torch.contiguous_format)


@dataclass(eq=False)
class _Part:
    """A few heads of one sample, cut into blocks, in the precision that is summed in; values get a column of ones.

    Args:
        at: Which sample and heads.
        tensors: ``(h, S, E)``, ``(h, S, E)`` and ``(h, S, D)``: queries, keys and values.
        blocks: ``(h, N, N)`` bool, or ``None``.
        lengths: ``(h or 1, N)`` int32.
        block: Tokens per block, at least 1.
        features: The feature map of queries and keys, or ``"given"``.
    """

    at: tuple[int, slice]
    tensors: InitVar[list[Tensor]]
    blocks: Tensor | None
    lengths: Tensor
    block: int
    features: str

    def __post_init__(self, tensors: list[Tensor]) -> None:
        self.count = self.lengths.shape[-1]
        self.dtype = torch.promote_types(tensors[2].dtype, torch.float32)
        self.real = (torch.arange(self.block, device=self.lengths.device) < self.lengths[..., None])[..., None]
        if self.features != "given":
            tensors = [*(feature_map(self.features, x) for x in tensors[:2]), tensors[2]]
        self.q, k, v = (self.cut(x) for x in tensors)
        self.k = k.masked_fill(~self.real, 0)
        self.v = pad(v, (0, 1), value=1)
        self.blocks = None if self.blocks is None else self.blocks.to(self.dtype)

    def cut(self, x: Tensor) -> Tensor:
        """Cut ``(h, S, E)`` into blocks: ``(h, N, block, E)``."""
        return pad(x.to(self.dtype), (0, 0, 0, self.count * self.block - x.shape[1])).unflatten(1, (-1, self.block))

    def join(self, x: Tensor, like: Tensor) -> Tensor:
        """Join ``(h, N, block, E)`` to ``(h, S, E)``, as long and of the same dtype as another tensor."""
        return x.flatten(1, 2)[:, : like.shape[2]].to(like.dtype)

    def before_features(self, x: Tensor, f: Tensor, df: Tensor) -> Tensor:
        """Return the gradient of queries or keys, ``(h, N, block, E)``, from that of their features."""
        if self.features == "softmax":
            return f * (df - (df * f).sum(-1, keepdim=True))
        if self.features == "given":
            return df
        return torch.where(self.cut(x[self.at]) > 0, df, df * f if self.features == "elu" else 0)

    def states(self) -> Tensor:
        """Sum keys and values up for each query block: ``(h, N or 1, E, D + 1)``, the last column the keys alone."""
        return self._gather(self.k.mT @ self.v, self.blocks)

    def spread(self, x: Tensor) -> Tensor:
        """Hand ``(h, N, E, D + 1)`` of query blocks back to their key blocks."""
        return self._gather(x, None if self.blocks is None else self.blocks.mT)

    def _gather(self, x: Tensor, blocks: Tensor | None) -> Tensor:
        if blocks is None:
            return x.sum(1, keepdim=True)
        return (blocks @ x.flatten(2)).view(x.shape)


def _parts(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, lengths: Tensor, block: int, features: str
) -> Iterator[_Part]:
    batch, heads, _, dim = v.shape
    lengths = lengths.expand(batch, heads, -1)
    state = lengths.shape[-1] * q.shape[3] * (dim + 1) * (8 if v.dtype == torch.float64 else 4)
    step = max(1, _STATE_BYTES // state)
    for b in range(batch):
        for first in range(0, heads, step):
            at = (b, slice(first, first + step))
            listed = None if blocks is None else blocks.expand(batch, heads, -1, -1)[at]
            yield _Part(at, [q[at], k[at], v[at]], listed, lengths[at], block, features)


def _divide(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Divide sums by their last column, 0 where that is 0: the quotients, and what they were multiplied with."""
    total = sums[..., -1:]
    weight = torch.where(total > 0, total, torch.inf).reciprocal()
    return sums[..., :-1] * weight, weight
