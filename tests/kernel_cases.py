"""Problems that every kernel is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdit.attention.kernels import block_sparse_attention
from fastdit.mask import BlockMask


@dataclass(frozen=True)
class Case:
    """One problem: shapes, blocks, and how many blocks a row lists.

    Args:
        heads: ``(B, H)``.
        mask_heads: Batch and head axes of the mask.
        tokens: Queries and keys.
        blocks: Queries and keys in a block.
        head_dim: Head dim.
        rows: ``"one"`` block per row, ``"some"``, ``"all"``, ``"empty"``: some rows list nothing, or ``"text"``: the
            last row lists everything, and all list the last block.
        padded: Whether each sample has its own key lengths, as padded text does.
    """

    heads: tuple[int, int] = (1, 2)
    mask_heads: tuple[int, int] = (1, 1)
    tokens: tuple[int, int] = (128, 128)
    blocks: tuple[int, int] = (32, 32)
    head_dim: int = 64
    rows: str = "some"
    padded: bool = False

    def __str__(self) -> str:
        shape = "x".join(str(n) for n in (*self.heads, *self.tokens, self.head_dim))
        return f"{shape}-mask{self.mask_heads[0]}{self.mask_heads[1]}-{self.rows}{'-padded' if self.padded else ''}"

    def mask(self) -> BlockMask:
        """Make the mask."""
        num_q, num_k = (-(-n // block) for n, block in zip(self.tokens, self.blocks, strict=True))
        order = torch.rand(*self.mask_heads, num_q, num_k).argsort(-1)
        count = {"one": 1, "some": max(2, num_k // 2), "all": num_k}.get(self.rows, max(1, num_k // 2))
        blocks = order < count
        if self.rows == "text":
            blocks[..., -1, :] = blocks[..., -1] = True
        mask = BlockMask.from_dense(
            blocks,
            block_q=self.blocks[0],
            block_k=self.blocks[1],
            tokens_q=self.tokens[0],
            tokens_k=self.tokens[1],
        )
        if self.padded:
            lengths = mask.lengths_k.expand(self.heads[0], 1, -1).clone()
            lengths[0, 0, -2:] = torch.tensor([self.blocks[1] // 2 + 1, 0])
            lengths[-1, 0, :2] = torch.tensor([1, 3])
            mask = mask.with_lengths_k(lengths)
        if self.rows == "empty":
            mask.counts[:, :, ::2] = 0
            mask.full_counts[:, :, ::2] = 0
        return mask

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Make q, k and v."""
        tokens_q, tokens_k = self.tokens
        return tuple(torch.randn(*self.heads, n, self.head_dim).to(dtype) for n in (tokens_q, tokens_k, tokens_k))


CASES = [
    Case(),
    Case(rows="one", tokens=(120, 100), head_dim=32),
    Case(rows="all", tokens=(70, 130), head_dim=96),
    Case(rows="empty", tokens=(128, 70), head_dim=64),
    Case(heads=(2, 2), mask_heads=(2, 2), tokens=(100, 100), head_dim=128),
    Case(heads=(2, 2), mask_heads=(1, 2), tokens=(96, 128), blocks=(16, 32), padded=True),
    Case(heads=(2, 1), tokens=(130, 250), blocks=(64, 128), head_dim=128, padded=True, rows="all"),
    Case(heads=(1, 1), tokens=(300, 256), blocks=(256, 64), head_dim=64),
    Case(heads=(1, 1), tokens=(33, 17), blocks=(16, 16), head_dim=16),
    Case(heads=(1, 1), tokens=(100, 200), blocks=(48, 96), head_dim=72),
    Case(heads=(2, 2), mask_heads=(1, 2), tokens=(100, 230), rows="text"),
    Case(heads=(2, 1), tokens=(100, 230), rows="text", padded=True),
    Case(heads=(1, 1), tokens=(40, 630), blocks=(16, 16), head_dim=32, rows="one"),
]


def naive(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None = None, compensate: str | None = None
) -> tuple[Tensor, Tensor]:
    """Compute masked attention in the dtype of the inputs, rounding after every operation."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    visible = mask.to_tokens(q.shape[2], k.shape[2])
    scores = (q @ k.mT * scale).masked_fill(~visible, -torch.inf)
    if compensate == "mean":
        means_k, means_v, sizes = means_by_hand(k, mask), means_by_hand(v, mask), mask.lengths_k[:, :, None]
        listed = mask.to_dense().repeat_interleave(mask.block_q, 2)[:, :, : q.shape[2]]
        added = (q @ means_k.mT * scale + sizes.double().log().to(q.dtype)).masked_fill(
            listed | (sizes == 0), -torch.inf
        )
        scores, v = torch.cat([scores, added], -1), torch.cat([v, means_v], 2)
    return scores.softmax(-1).nan_to_num(0) @ v, scores.double().logsumexp(-1)


def means_by_hand(x: Tensor, mask: BlockMask) -> Tensor:
    """Average each key block over its real tokens, one by one."""
    lengths = mask.lengths_k.expand(*x.shape[:2], -1)
    means = torch.zeros(*x.shape[:2], mask.num_k, x.shape[3], dtype=x.dtype, device=x.device)
    for b, h, j in torch.cartesian_prod(*(torch.arange(n) for n in means.shape[:3])).tolist():
        length = int(lengths[b, h, j])
        if length:
            means[b, h, j] = x[b, h, j * mask.block_k : j * mask.block_k + length].double().mean(0)
    return means


def check_against_reference(
    case: Case,
    dtype: torch.dtype,
    kernel: str,
    device: str = "cpu",
    compensate: str | None = None,
    variant: str | None = None,
) -> None:
    """Run a kernel on a case and compare with fp64: at most twice the error of eager attention, plus rounding.

    Raises:
        AssertionError: The kernel is off.
    """
    mask = case.mask().to(device)
    q, k, v = (x.to(device) for x in case.tensors(dtype))
    real = (torch.arange(mask.block_k, device=device) < mask.lengths_k[..., None]).flatten(2)[..., : k.shape[2], None]
    k, v = k.where(real, 300), v.where(real, -700)  # padding may hold anything
    out, lse = block_sparse_attention(q, k, v, mask, kernel=kernel, compensate=compensate, variant=variant)
    exact, exact_lse = naive(q.double(), k.double(), v.double(), mask, compensate=compensate)
    eager = naive(q, k, v, mask, compensate=compensate)[0]
    assert out.dtype == dtype and out.shape == q.shape
    assert lse.dtype == torch.promote_types(dtype, torch.float32) and lse.shape == q.shape[:3]
    error, budget = (out - exact).abs().max(), 2 * (eager - exact).abs().max() + 8 * torch.finfo(dtype).eps
    assert error <= budget, f"{kernel}: error {error:.2e}, budget {budget:.2e}"
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert (out[empty] == 0).all()
    if not empty.all():
        assert (lse - exact_lse)[~empty].abs().max() <= lse_budget(q, k, mask, compensate)


def lse_budget(q: Tensor, k: Tensor, mask: BlockMask, compensate: str | None) -> float:
    """Return the error a log-sum-exp may have: that of fp32 sums, and of means rounded to the dtype of the keys."""
    budget = 1e-4 if q.dtype.itemsize == 2 else 1e-5
    if compensate is None:
        return budget
    means = means_by_hand(k.double(), mask)
    rounding = (q.double() @ (means - means.to(k.dtype)).mT).abs().max()
    return budget + float(rounding) * q.shape[3] ** -0.5
