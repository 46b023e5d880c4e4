"""The Triton kernels that choose blocks, run by Triton's interpreter. Run by test_choice.py with TRITON_INTERPRET=1."""


import pytest
import torch

from fastdit.attention.kernels.triton_mass import triton_block_mass
from fastdit.attention.mass import block_mass


def ragged(tokens, block, *shape):
    """Lengths of blocks up to a number of tokens, some of them shorter, one empty."""
    full = (tokens - torch.arange(0, tokens, block)).clamp(max=block)
    lengths = (full * torch.rand(*shape, len(full))).ceil().to(torch.int32)
    lengths[..., 0] = full[0]
    if len(full) > 2:
        lengths[..., 1] = 0
    return lengths


def poison(x, block, lengths):
    """Fill padding with NaN."""
    real = (torch.arange(block) < lengths[..., None]).flatten(2)[..., : x.shape[2], None]
    return x.masked_fill(~real.expand_as(x), torch.nan)


MASSES = [
    ((1, 2), (70, 90), 16, 32, torch.float32, (1, 1)),
    ((2, 2), (64, 33), 32, 72, torch.bfloat16, (2, 1)),
    ((2, 1), (130, 260), 128, 64, torch.float16, (2, 1)),
    ((1, 2), (300, 257), 256, 128, torch.float32, (1, 2)),
    ((1, 1), (15, 7), 16, 16, torch.bfloat16, (1, 1)),
]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("heads", "tokens", "block", "dim", "dtype", "shape"), MASSES, ids=str)
def test_mass(heads, tokens, block, dim, dtype, shape, cached, poisoned_empty):
    """Against fp64, on padding that is NaN, tokens first in memory, more queries than keys and the reverse."""
    q, k = (torch.randn(heads[0], n, heads[1], dim).to(dtype).transpose(1, 2) * 2 for n in tokens)
    lse = torch.randn(*heads, tokens[0]) + 3 if cached else None
    shapes = {"scale": 0.2, "block": block}
    for side, n in zip("qk", tokens, strict=True):
        shapes[f"lengths_{side}"] = ragged(n, block, *shape)
    expected = block_mass(q.double(), k.double(), lse, **shapes)
    bad_q, bad_k = poison(q, block, shapes["lengths_q"]), poison(k, block, shapes["lengths_k"])
    found = triton_block_mass(bad_q, bad_k, lse, **shapes)
    assert found.dtype == torch.float32
    eager = block_mass(q.float(), k.float(), lse, **shapes)
    error, budget = (found - expected).abs().max(), 2 * (eager - expected).abs().max() + 1e-5 * expected.max()
    assert error <= budget, f"error {error:.2e}, budget {budget:.2e}"
