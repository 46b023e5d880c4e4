"""The choice of blocks on a device, and tokens taken through a layout."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from fastdit.attention import MethodState, get_method, mass, reorder
from fastdit.attention.kernels import means
from fastdit.attention.pattern import pattern_of
from fastdit.attention.reorder import lay_out, part_scores, pool_laid_out, put_back
from fastdit.attention.select import pool_blocks
from fastdit.layout import TokenLayout
from fastdit.mask import BlockMask
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

SPECS = [
    TokenSpec(VideoGrid(3, 5, 7)),
    TokenSpec(VideoGrid(3, 5, 7), 9, text_first=True),
    TokenSpec(VideoGrid(2, 4, 4)),
]


def layout_of(spec, heads):
    """An order of each head, or of all, in blocks of 16, with a tile of 10 that ends early."""
    count = spec.grid.num_tokens
    order = torch.stack([torch.randperm(count) for _ in range(heads)])
    return TokenLayout.build(spec, block=16, order=order, segments=torch.tensor([10, count - 10]))


@pytest.mark.parametrize(("spec", "heads"), list(itertools.product(SPECS, (1, 3))), ids=str)
def test_there_and_back(spec, heads):
    layout = layout_of(spec, heads)
    tensors = torch.randn(3, 2, 3, spec.num_tokens, 8).unbind()
    laid_out = lay_out(layout, *tensors)
    for x, found in zip(tensors, laid_out, strict=True):
        assert torch.equal(found, layout.apply(x)) and torch.equal(put_back(layout, found), x)


@pytest.mark.parametrize(("spec", "heads", "parts"), list(itertools.product(SPECS, (1, 2), (1, 4, 16))), ids=str)
def test_scores_of_parts_are_the_mass_of_their_means(spec, heads, parts):
    """Each part is one key, as heavy as it has tokens, and one query, likewise; parts without tokens are none."""
    layout = layout_of(spec, heads)
    q, k = torch.randn(2, 2, 2, spec.num_tokens, 8).unbind()
    scores = part_scores(q, k, layout, parts=parts, scale=0.7)
    video, size = layout.video_blocks, 16 // parts
    pooled = pool_laid_out(layout, k, parts=parts)
    assert scores.shape == (2, 2, video, video) and pooled.shape == (2, 2, layout.num_blocks * parts, 8)
    for b, h in itertools.product(range(2), range(2)):
        runs = [run[run >= 0] for run in layout.index[h % heads].split(size)]
        for n, run in enumerate(runs):
            expected = k[b, h, run].mean(0) if len(run) else torch.zeros(8)
            torch.testing.assert_close(pooled[b, h, n], expected)
        runs = runs[: video * parts]
        sizes = torch.tensor([len(run) for run in runs], dtype=torch.float64)
        q_means, k_means = (
            torch.stack([x[b, h, run].double().mean(0) if len(run) else torch.zeros(8).double() for run in runs])
            for x in (q, k)
        )
        weights = (q_means @ k_means.T * 0.7).exp() * sizes
        weights = weights / weights.sum(1, keepdim=True) * sizes[:, None]
        for i, j in itertools.product(range(video), range(video)):
            rows, columns = slice(i * parts, (i + 1) * parts), slice(j * parts, (j + 1) * parts)
            found = weights[rows, columns].sum() / sizes[rows].sum()
            assert float(scores[b, h, i, j]) == pytest.approx(float(found), rel=1e-4)


def test_one_part_is_a_pooled_block():
    layout = layout_of(SPECS[1], 2)
    x = torch.randn(1, 2, SPECS[1].num_tokens, 8).bfloat16()
    assert torch.equal(pool_laid_out(layout, x), pool_blocks(layout.apply(x), 16, layout.lengths()))


class Launch:
    """Stands in for a Triton kernel that cannot be launched."""

    def __init__(self, launched, name):
        self.launched, self.name = launched, name

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launched.add(self.name)


KERNELS = ("triton.mass._block_mass", "triton.means._block_means", "triton.lists._lists", "triton.layout._lay_out")
METHODS = {
    "adaspa": {"_block_mass", "_lists", "_lay_out"},
    "sla": {"_block_means", "_lists"},
    "draft": {"_block_means", "_lists"},
}


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_nothing_waits_for_the_device(name, triton, monkeypatch):
    """From q and k to the launch, on tensors without data: whatever asked for a value would raise."""
    launched = set()
    if triton:
        pytest.importorskip("triton")
        for kernel in KERNELS:
            module, function = kernel.rsplit(".", 1)
            monkeypatch.setattr(f"fastdit.attention.kernels.{module}.{function}_kernel", Launch(launched, function))
    spec = TokenSpec(VideoGrid(3, 9, 11), 19)
    padding = torch.zeros(2, spec.num_tokens, dtype=torch.bool)
    padding[:, spec.text.start + 5 :] = True
    call = AttentionCall(spec, key_padding=padding)
    fields = {"tile": (1, 4, 4)} if name == "draft" else {"block_size": 16}
    method, state = get_method(name, **fields), MethodState()
    q, k = torch.randn(2, 2, 4, spec.num_tokens, 16).unbind()
    lengths = state.mask(method.pattern(q, k, call, state), call).lengths_k
    if triton:
        for module in (mass, means, reorder):
            monkeypatch.setattr(module, "takes_triton", lambda *tensors: True)
        monkeypatch.setattr("fastdit.attention.pattern.has_triton", lambda device: True)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        with pytest.raises(DataDependentOutputException):
            fake.from_tensor(q).sum().item()
        found = method.pattern(fake.from_tensor(q), fake.from_tensor(k), call, state)
        mask = state.mask(found, call)
        assert mask.kept.shape == () and mask.lengths_k.shape == lengths.shape
    assert launched == (METHODS[name] if triton else set())


def to_cuda(layout):
    return replace(layout, index=layout.index.cuda(), inverse=layout.inverse.cuda())


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


class TestOnAGpu:
    """The compiled kernels against what the same calls give without them."""

    pytestmark = ON_GPU

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize(("block", "dim"), [(16, 32), (64, 128), (128, 64), (256, 72)])
    @pytest.mark.parametrize("cached", [True, False])
    def test_mass(self, block, dim, dtype, cached, poisoned_empty):
        tokens = 3 * block - 5
        q, k = torch.randn(2, 2, tokens, 3, dim, device="cuda").to(dtype).transpose(2, 3).unbind()
        lengths = torch.tensor([[[block, block // 2, block - 5]]], device="cuda")
        lse = torch.randn(2, 3, tokens, device="cuda") + 3 if cached else None
        shapes = {"scale": dim**-0.5, "block": block, "lengths_q": lengths, "lengths_k": lengths}
        found, expected = mass.block_mass(q, k, lse, **shapes), mass.block_mass(q.double(), k.double(), lse, **shapes)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("spec", "heads"), list(itertools.product(SPECS, (1, 3))), ids=str)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_orders_and_means(self, spec, heads, dtype, poisoned_empty):
        layout = layout_of(spec, heads)
        tensors = torch.randn(3, 2, 3, spec.num_tokens, 72).to(dtype).unbind()
        laid_out = lay_out(to_cuda(layout), *(x.cuda() for x in tensors))
        for x, found in zip(tensors, laid_out, strict=True):
            assert torch.equal(found.cpu(), layout.apply(x))
            assert torch.equal(put_back(to_cuda(layout), found).cpu(), x)
            for parts in (1, 4):
                means = pool_laid_out(to_cuda(layout), x.cuda(), parts=parts)
                torch.testing.assert_close(means.cpu(), pool_laid_out(layout, x, parts=parts))

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_lists(self, spec):
        layout = layout_of(spec, 1)
        video = layout.video_blocks
        blocks = torch.rand(2, 3, video, video).argsort(-1) < torch.tensor([0, 3, video])[torch.arange(video) % 3, None]
        found = pattern_of(to_cuda(layout), blocks.cuda(), max_count=3).mask
        expected = pattern_of(layout, blocks, max_count=3).mask
        for name in ("counts", "full_counts", "every", "kept"):
            assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
        assert torch.equal(found.to_dense().cpu(), expected.to_dense())

    @pytest.mark.parametrize("name", METHODS)
    def test_nothing_waits(self, name):
        """CUDA itself raises where the host would wait."""
        spec = TokenSpec(VideoGrid(3, 9, 11), 19)
        q, k, v = torch.randn(3, 1, 4, spec.num_tokens, 64, device="cuda").bfloat16().unbind()
        method, call, state = get_method(name), AttentionCall(spec), MethodState()
        for _ in range(2):
            method.forward(q, k, v, call, state)
        torch.cuda.set_sync_debug_mode("error")
        try:
            method.forward(q, k, v, call, state)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_longest_rows_are_looked_up_only_where_no_bound_is_known():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        BlockMask.from_dense(torch.ones(4, 4, dtype=torch.bool), block_q=16, block_k=16)
