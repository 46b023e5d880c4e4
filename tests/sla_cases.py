"""Problems that the kernels of linear attention are held to, with the definition token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.attention.methods.sla.linear import join_linear_attention, linear_attention

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class SlaCase:
    """One problem.

    Args:
        heads: ``(B, H)``.
        map_heads: Batch and head axes of the map of blocks; ``None`` to list all blocks.
        tokens: Tokens in all.
        block: Tokens in a block.
        head_dim: Head dim.
        features: Feature map, or ``"given"``.
        padded: Whether each head of each sample has its own key lengths.
    """

    heads: tuple[int, int] = (1, 2)
    map_heads: tuple[int, int] | None = (1, 2)
    tokens: int = 57
    block: int = 16
    head_dim: int = 16
    features: str = "softmax"
    padded: bool = False

    def __str__(self) -> str:
        shape = "x".join(str(n) for n in (*self.heads, self.tokens, self.head_dim))
        covered = "all" if self.map_heads is None else f"map{self.map_heads[0]}{self.map_heads[1]}"
        return f"{shape}-{covered}-{self.features}{'-padded' if self.padded else ''}"

    def blocks(self) -> Tensor | None:
        """Make the map of blocks: the first row lists none, as one whose blocks are all critical, the last one all."""
        if self.map_heads is None:
            return None
        num = -(-self.tokens // self.block)
        blocks = torch.rand(*self.map_heads, num, num) < 0.5
        blocks[..., -1, :] = True
        blocks[..., 0, :] = False
        return blocks

    def lengths(self) -> Tensor:
        """Make the lengths of the key blocks; with padding, one in each head is empty."""
        full = (self.tokens - torch.arange(0, self.tokens, self.block)).clamp(max=self.block)
        if not self.padded:
            return full.to(torch.int32).view(1, 1, -1)
        lengths = (full * torch.rand(*self.heads, len(full))).ceil()
        lengths.scatter_(-1, torch.randint(len(full), (*self.heads, 1)), 0)
        return lengths.to(torch.int32)

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """Make q, k, v and a gradient of the output; features that are given are twice as many."""
        q, k, v, grad = torch.randn(4, *self.heads, self.tokens, self.head_dim).unbind()
        if self.features == "given":
            q, k = (torch.cat([x.softmax(-1), (-x).softmax(-1)], -1) for x in (q, k))
        return [x.to(dtype) for x in (q, k, v + 0.5, grad)]


CASES = [
    (SlaCase(tokens=41), FP32),
    (SlaCase(tokens=37, features="elu", padded=True), FP32),
    (SlaCase(features="relu"), FP16),
    (SlaCase(heads=(1, 1), map_heads=(1, 1), tokens=24, features="given", head_dim=24, padded=True), FP32),
    (SlaCase(map_heads=None, padded=True), BF16),
    (SlaCase(heads=(1, 1), map_heads=None, tokens=270, features="elu"), BF16),
    (SlaCase(heads=(2, 2), map_heads=(2, 2), tokens=26, block=48), BF16),
    (SlaCase(heads=(2, 2), map_heads=(2, 1), tokens=24, features="given", padded=True), BF16),
    (SlaCase(heads=(1, 1), map_heads=(1, 1), tokens=13), FP16),
    (SlaCase(heads=(1, 1), map_heads=(1, 1), tokens=200, padded=True), BF16),
    (SlaCase(heads=(1, 1), map_heads=(1, 1), tokens=70, head_dim=72, block=64, padded=True), BF16),
    (SlaCase(heads=(1, 1), map_heads=(1, 1), tokens=70, head_dim=64, block=64, features="elu"), FP16),
    (SlaCase(heads=(1, 1), map_heads=(1, 1), tokens=40, head_dim=128, block=32), BF16),
]

JOINED = [
    (SlaCase(tokens=37, features="elu", padded=True), FP32, "projected"),
    (SlaCase(heads=(2, 1), map_heads=None, tokens=35, features="relu"), FP32, "projected"),
    (SlaCase(heads=(2, 2), map_heads=(2, 1), tokens=24, features="given", padded=True), FP32, "mixed"),
    (SlaCase(heads=(2, 2), map_heads=(2, 2), tokens=26, block=48), BF16, "projected"),
    (SlaCase(heads=(2, 2), map_heads=(1, 2), tokens=41, padded=True), BF16, "mixed"),
    (SlaCase(heads=(1, 1), map_heads=(1, 1), tokens=70, head_dim=72, block=64, padded=True), BF16, "projected"),
    (SlaCase(heads=(1, 1), map_heads=None, tokens=70, head_dim=72, block=64, features="elu"), FP16, "mixed"),
    (SlaCase(heads=(1, 1), map_heads=(1, 1), tokens=70, head_dim=64, block=32, features="given"), FP16, "projected"),
    (SlaCase(heads=(1, 1), map_heads=(1, 1), tokens=40, head_dim=128, block=32), BF16, "projected"),
]


def definition(case: SlaCase, blocks: Tensor | None, lengths: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute linear attention in the dtype of the inputs, from the weights of all pairs of tokens."""
    mapped = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: F.elu(x) + 1, "relu": F.relu, "given": lambda x: x}
    q, k = (mapped[case.features](x) for x in (q, k))
    keys = torch.arange(case.tokens, device=q.device)
    listed = (keys % case.block < lengths[..., keys // case.block])[..., None, :]
    if blocks is not None:
        listed = listed & blocks[..., keys // case.block, :][..., keys // case.block]
    weight = (q @ k.mT) * listed
    total = weight.sum(-1, keepdim=True)
    return torch.where(total > 0, weight / torch.where(total > 0, total, 1), 0) @ v


def check_linear(case: SlaCase, dtype: torch.dtype, device: str = "cpu") -> None:
    """Compare with fp64, gradients too: at most twice the error of the definition in the same dtype, plus rounding.

    Raises:
        AssertionError: The kernels are off.
    """
    blocks, lengths = case.blocks(), case.lengths().to(device)
    blocks = None if blocks is None else blocks.to(device)
    q, k, v, grad = (x.to(device) for x in case.tensors(dtype))
    real, bad = real_tokens(case, lengths), [q, *poisoned(case, lengths, k, v)]

    def triton(*tensors: Tensor) -> Tensor:
        return linear_attention(*tensors, blocks, lengths, case.block, case.features, "triton")

    def by_definition(*tensors: Tensor) -> Tensor:
        return definition(case, blocks, lengths, *tensors)

    actual = with_gradients(triton, grad, *bad)
    wanted = with_gradients(by_definition, grad.double(), *(x.double() for x in (q, k, v)))
    rounded = with_gradients(by_definition, grad, q, k, v)
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), actual, wanted, rounded, strict=True):
        assert x.dtype == dtype and x.shape == y.shape
        error, budget = (x - y).abs().max(), 2 * (z - y).abs().max() + 8 * torch.finfo(dtype).eps * y.abs().max()
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"
    for x in actual[2:]:
        assert (x.masked_select(~real.expand_as(x)) == 0).all()
    if blocks is not None:
        assert (actual[0][:, :, : case.block] == 0).all() and (actual[1][:, :, : case.block] == 0).all()


def with_gradients(attention, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return what a function returns, and its gradients."""
    tensors = tuple(x.detach().requires_grad_() for x in tensors)
    out = attention(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def check_joined(case: SlaCase, dtype: torch.dtype, kind: str, device: str = "cpu") -> None:
    """Compare the fused kernel with fp64, likewise; rows that list nothing have to be those of the exact part.

    Raises:
        AssertionError: The kernel is off.
    """
    blocks, lengths, exact, join = problem(case, dtype, kind)
    q, k, v, exact = (x.to(device) for x in (*case.tensors(dtype)[:3], exact))
    blocks, lengths, *join = (None if x is None else x.to(device) for x in (blocks, lengths, *join))
    out = join_linear_attention(
        exact, *join, q, *poisoned(case, lengths, k, v), blocks, lengths, case.block, case.features
    )
    wanted = joined(case, blocks, lengths, *(x if x is None else x.double() for x in (exact, *join, q, k, v)))
    rounded = joined(case, blocks, lengths, *(x if x is None else x.to(dtype) for x in (exact, *join, q, k, v)))
    assert out.dtype == dtype and out.shape == wanted.shape and out.is_contiguous()
    error = (out - wanted).abs().max()
    budget = 2 * (rounded - wanted).abs().max() + 8 * torch.finfo(dtype).eps * wanted.abs().max()
    assert error <= budget, f"error {error:.2e}, budget {budget:.2e}"
    if blocks is not None:
        assert torch.equal(out[:, :, : case.block], exact[:, :, : case.block])


def problem(
    case: SlaCase, dtype: torch.dtype, kind: str
) -> tuple[Tensor | None, Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Make a map of blocks, lengths, an exact part with heads inside, and how the linear part is joined to it."""
    blocks, num = case.blocks(), -(-case.tokens // case.block)
    exact = torch.randn(case.heads[0], case.tokens, case.heads[1], case.head_dim).to(dtype).transpose(1, 2)
    share = None if blocks is None else blocks.any(-1)
    if kind == "mixed":
        share = (torch.rand(1, case.heads[1], num) * (1 if share is None else share)).to(dtype)
        return blocks, case.lengths(), exact, (share, None, None)
    weight, bias = torch.randn(case.head_dim, case.head_dim), torch.randn(case.head_dim)
    return blocks, case.lengths(), exact, (share, (weight * case.head_dim**-0.5).to(dtype), bias.to(dtype))


def joined(
    case: SlaCase,
    blocks: Tensor | None,
    lengths: Tensor,
    exact: Tensor,
    share: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *tensors: Tensor,
) -> Tensor:
    """Join both parts in the dtype of the inputs, token by token."""
    linear = definition(case, blocks, lengths, *tensors)
    added = linear - exact if weight is None else linear @ weight.mT + bias
    if share is None:
        return exact + added
    return exact + share[..., torch.arange(case.tokens, device=exact.device) // case.block, None] * added


def poisoned(case: SlaCase, lengths: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Fill what is padding with NaN."""
    real = real_tokens(case, lengths)
    return [x.masked_fill(~real, torch.nan) for x in tensors]


def real_tokens(case: SlaCase, lengths: Tensor) -> Tensor:
    """Say which tokens are no padding, ``(B, H, S, 1)``."""
    keys = torch.arange(case.tokens, device=lengths.device)
    return (keys % case.block < lengths[..., keys // case.block])[..., None].expand(*case.heads, -1, -1)
