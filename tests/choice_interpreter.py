"""Triton kernels that choose blocks, in Triton's interpreter. Run by test_interpreter.py with TRITON_INTERPRET=1."""

import itertools

import pytest
import torch

from fastdit.attention.kernels.means import means_of_blocks
from fastdit.attention.kernels.triton.layout import triton_lay_out
from fastdit.attention.kernels.triton.lists import triton_lists, triton_mask
from fastdit.attention.kernels.triton.mass import triton_block_mass
from fastdit.attention.kernels.triton.means import triton_means_of_blocks
from fastdit.attention.mass import block_mass
from fastdit.attention.select import keep_text
from fastdit.layout import TokenLayout
from fastdit.mask import BlockMask
from fastdit.tokens import TokenSpec, VideoGrid


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
    ((1, 2), (40, 55), 16, 32, torch.float32, (1, 2)),
    ((2, 2), (64, 33), 32, 72, torch.bfloat16, (2, 1)),
    ((2, 1), (130, 260), 128, 64, torch.float16, (2, 1)),
    ((1, 1), (300, 257), 256, 128, torch.bfloat16, (1, 1)),
    ((1, 1), (33, 60), 32, 128, torch.float32, (1, 1)),
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


@pytest.mark.parametrize(("text", "max_count"), [(0, 9), (19, 4)])
def test_masks(text, max_count):
    """The mask of a choice is the one made without Triton, with rows that keep all and rows that keep few."""
    layout, _ = layout_of(1, text)
    video, num = layout.video_blocks, layout.num_blocks
    blocks = torch.rand(2, 3, video, video).argsort(-1) < torch.tensor([1, 4, video, 0])[torch.arange(video) % 4, None]
    found = triton_mask(blocks, 16, layout.lengths()[None], max_count=max_count + num - video)
    expected = BlockMask.from_dense(
        keep_text(blocks, num, num), block_q=16, block_k=16, lengths_q=found.lengths_q, lengths_k=found.lengths_k
    )
    assert torch.equal(found.to_dense(), expected.to_dense())
    assert torch.equal(found.every, expected.every) and torch.equal(found.kept, expected.kept)


def layout_of(heads, text):
    """A ragged video in an order of each head, or of all, in blocks of 16, padded after a tile of 10 and at the end."""
    spec = TokenSpec(VideoGrid(3, 5, 7), text)
    order = torch.stack([torch.randperm(105) for _ in range(heads)])
    return TokenLayout.build(spec, block=16, order=order, segments=torch.tensor([10, 95])), spec.num_tokens


@pytest.mark.parametrize(("heads", "text", "dim", "count"), [(1, 0, 32, 3), (2, 19, 72, 2), (2, 19, 128, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layout(heads, text, dim, count, dtype, poisoned_empty):
    """Copies are exact, whatever the strides of what is copied; padding is 0."""
    layout, tokens = layout_of(heads, text)
    tensors = torch.randn(count, 2, tokens, 2, dim).to(dtype).transpose(2, 3).unbind()
    laid_out = triton_lay_out(layout.index, *tensors)
    assert len(laid_out) == count
    for x, found in zip(tensors, laid_out, strict=True):
        assert torch.equal(found, layout.apply(x))
        assert torch.equal(*triton_lay_out(layout.inverse, found), x)


@pytest.mark.parametrize(("heads", "text", "dim"), [(1, 0, 32), (2, 19, 72)])
def test_means_in_an_order(heads, text, dim, poisoned_empty):
    """Tokens are averaged where they are, as if they had been put in order first."""
    layout, tokens = layout_of(heads, text)
    x = torch.randn(2, tokens, 2, dim).bfloat16().transpose(1, 2)
    lengths = layout.lengths()
    found = triton_means_of_blocks(x, 16, lengths, index=layout.index)
    torch.testing.assert_close(found, means_of_blocks(layout.apply(x), 16, lengths))


@pytest.mark.parametrize("shape", [(), (2,), (1, 2), (2, 1)], ids=str)
def test_means_with_any_lengths(shape, poisoned_empty):
    """On padding that is NaN, in blocks whose size no tile divides, one of them empty."""
    lengths = ragged(110, 48, *shape)
    clean = torch.randn(2, 2, 110, 40)
    x = poison(clean, 48, lengths.view(*[1] * (3 - lengths.ndim), *lengths.shape))
    torch.testing.assert_close(triton_means_of_blocks(x, 48, lengths), means_of_blocks(clean, 48, lengths))


LISTS = [(1, 1, 13, 13), (2, 2, 5, 40), (1, 2, 12, 3), (2, 1, 1, 1), (1, 1, 3, 1100)]


@pytest.mark.parametrize(("shape", "text"), list(itertools.product(LISTS, [0, 2])), ids=str)
def test_lists(shape, text):
    """As a mask makes them by sorting: rows that are empty, whole, random; ragged blocks anywhere, transposed maps."""
    blocks = torch.rand(shape) < torch.tensor([0, 0.3, 1, 0.05])[torch.arange(shape[2]) % 4][:, None]
    num_q, num_k = shape[2] + text, shape[3] + text
    lengths = torch.where(torch.rand(num_k) < 0.3, 7, 16)
    whole = keep_text(blocks, num_q, num_k)
    expected = BlockMask.from_dense(whole, block_q=16, block_k=16, lengths_k=lengths)
    width = expected.indices.shape[-1]
    for given in (blocks, blocks.mT.contiguous().mT, blocks[:1].expand(shape) if shape[0] == 1 else blocks):
        indices, counts, full_counts = triton_lists(given, lengths < 16, num_q=num_q, num_k=num_k, width=width)
        assert torch.equal(counts, expected.counts) and torch.equal(full_counts, expected.full_counts)
        short = (counts < num_k)[..., None]
        assert torch.equal(indices * short, expected.indices * short)
        assert ((indices >= 0) & (indices < num_k)).all()
