"""Selection maths against definitions by loops over blocks and tokens."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit.attention import MethodState, get_method, select
from fastdit.attention.select import (
    by_heads,
    keep_first_frame,
    keep_own,
    keep_text,
    keep_top_fraction,
    keep_top_k,
    keep_top_p,
    pool_blocks,
    sample_tokens,
    sampled_scores,
    top_count,
)
from fastdit.layout import TokenLayout
from fastdit.token_orders import token_order
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

SPECS = [
    TokenSpec(VideoGrid(3, 5, 7)),
    TokenSpec(VideoGrid(3, 5, 7), 9, text_first=True),
    TokenSpec(VideoGrid(1, 2, 3), 20),
]


def laid_out(spec, heads=2, batch=2, dtype=torch.float32):
    """A sequence in blocks of 16 whose padding is NaN, its layout, and lengths as ``(B, H, N)``."""
    order = torch.stack([torch.randperm(spec.grid.num_tokens) for _ in range(heads)])
    layout = TokenLayout.build(spec, block=16, order=order)
    x = layout.apply(torch.randn(batch, heads, spec.num_tokens, 5).to(dtype))
    x.index_fill_(2, layout.padding, torch.nan)
    return x, layout, layout.lengths().expand(batch, -1, -1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pools_hold_the_real_tokens_alone(spec, dtype):
    x, layout, lengths = laid_out(spec, dtype=dtype)
    mean = pool_blocks(x, 16, layout.lengths())
    assert mean.dtype == torch.float32
    for b, h, n in itertools.product(range(2), range(2), range(layout.num_blocks)):
        tokens = x[b, h, n * 16 : n * 16 + int(lengths[b, h, n])].float()
        torch.testing.assert_close(mean[b, h, n], tokens.mean(0))


def test_pools_take_lengths_per_sample_and_empty_blocks():
    x = torch.arange(40.0).view(1, 1, 40, 1).repeat(2, 1, 1, 1)
    lengths = torch.tensor([[[16, 3, 0]], [[1, 16, 8]]])
    assert pool_blocks(x, 16, lengths).flatten(1).tolist() == [[7.5, 17, 0], [0, 23.5, 35.5]]
    for wrong in (torch.tensor([16, 16]), torch.tensor([16, 16, 8, 0])):
        with pytest.raises(ValueError, match="do not fit a sequence of 40 positions"):
            pool_blocks(x, 16, wrong)


def test_pools_sum_in_single_precision():
    x = torch.full((1, 1, 256, 1), 1.001, dtype=torch.bfloat16)
    assert pool_blocks(x, 256, torch.tensor([256])).item() == pytest.approx(float(x[0, 0, 0, 0]), rel=1e-6)


def ranked(row):
    """Indices of a row from the largest score on, the lower index first among equals."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


def rows_of(scores, choose):
    """Apply a choice of indices to every row."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for row, flags in zip(scores.flatten(0, -2).tolist(), kept.flatten(0, -2), strict=True):
        flags[choose(row)] = True
    return kept


def dyadic(*shape):
    """Scores whose sums are exact, with many ties and zeros."""
    return torch.randint(0, 6, shape) / 64


@pytest.mark.parametrize("count", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k(count, dtype):
    for scores in (dyadic(2, 3, 7, 13), torch.rand(2, 3, 7, 13), torch.zeros(1, 13), torch.full((4, 13), -torch.inf)):
        scores = scores.to(dtype)
        kept = keep_top_k(scores, count)
        assert torch.equal(kept, rows_of(scores, lambda row: ranked(row)[:count]))
        assert (kept.sum(-1) == count).all()


def test_counts():
    assert [top_count(d, 10) for d in (0, 1e-9, 0.04, 0.15, 0.25, 0.96, 1)] == [1, 1, 1, 2, 3, 10, 10]
    assert top_count(0.5, 1) == 1
    for count in (0, 8):
        with pytest.raises(ValueError, match=r"count must be in \[1, 7\]"):
            keep_top_k(torch.rand(3, 7), count)


@pytest.mark.parametrize("mass", [0.01, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 1), (0, 0.4), (0.2, 0.5), (0.3, 0.3)])
def test_top_p_keeps_the_score_that_crosses(mass, low, high):
    def choose(row):
        order, needed, total = ranked(row), 0, 0.0
        while total < mass * sum(row):
            total += row[order[needed]]
            needed += 1
        return order[: min(max(needed, top_count(low, len(row))), top_count(high, len(row)))]

    for scores in (dyadic(2, 3, 6, 11), torch.zeros(1, 11), torch.eye(11)):
        assert torch.equal(keep_top_p(scores, mass, min_density=low, max_density=high), rows_of(scores, choose))


def test_top_p_reaches_the_mass_with_as_few_as_can_be():
    scores = torch.randn(64, 300).mul(3).softmax(-1)
    kept = keep_top_p(scores, 0.95)
    held = (scores.double() * kept).sum(-1)
    least = (scores.double().masked_fill(~kept, 2)).amin(-1)
    assert (held >= 0.95 - 1e-6).all() and (held - least < 0.95 + 1e-6).all()
    assert keep_top_p(scores, 1.0).all()


@pytest.mark.parametrize("density", [1e-6, 0.2, 0.5, 1.0])
def test_top_fraction_of_a_map(density):
    scores = torch.cat([dyadic(2, 2, 6, 8), torch.rand(2, 2, 6, 8)])
    kept = keep_top_fraction(scores, density)
    count = 48 - min(math.floor((1 - density) * 48 + 1e-6), 47)
    expected = rows_of(scores.flatten(-2), lambda row: ranked(row)[:count])
    assert torch.equal(kept.flatten(-2), expected)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_tokens_are_drawn_from_each_block(spec):
    _, layout, _ = laid_out(spec, heads=4)
    lengths = layout.lengths()[0]
    tokens = sample_tokens(lengths, 16, 6, heads=4, seed=3)
    assert tokens.shape == (1, 4, layout.num_blocks, 6)
    for head in range(4):
        turn = None
        for n, length in enumerate(lengths.tolist()):
            drawn = [t for t in tokens[0, head, n].tolist() if t >= 0]
            places = [t - 16 * n for t in drawn]
            assert len(set(places)) == min(6, length) and all(0 <= p < length for p in places)
            assert tokens[0, head, n, : len(drawn)].tolist() == drawn, "missing ones come last"
            if length == 16:
                assert turn in (None, places), "the same places in every whole block"
                turn = places
    assert len({tuple(row[0].tolist()) for row in tokens[0]}) > 1, "heads draw on their own"
    assert torch.equal(tokens, sample_tokens(lengths, 16, 6, heads=4, seed=3))
    assert not torch.equal(tokens, sample_tokens(lengths, 16, 6, heads=4, seed=4))


def test_drawing_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    lengths = torch.tensor([16])
    with torch.device("meta"):  # nor does the default device matter
        sample_tokens(lengths, 16, 4, heads=2)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("samples", [1, 5, 16])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_sampled_scores_are_the_mass_of_the_drawn_tokens(spec, samples, monkeypatch):
    q, layout, lengths = laid_out(spec)
    k = q.roll(1, 3)
    tokens = sample_tokens(layout.lengths(), 16, samples, heads=2)
    scores = sampled_scores(q, k, tokens, layout.lengths(), scale=0.7)
    blocks = layout.num_blocks
    for b, h in itertools.product(range(2), range(2)):
        drawn = [[t for t in row if t >= 0] for row in tokens[0, h].tolist()]
        weights = [[int(lengths[b, h, n]) / len(row)] * len(row) for n, row in enumerate(drawn)]
        index = torch.tensor(list(itertools.chain(*drawn)))
        weight = list(itertools.chain(*weights))
        logits = k[b, h, index].double() @ q[b, h, index].double().T * 0.7
        mass = logits.exp() * torch.tensor(weight, dtype=torch.float64)[:, None]
        mass = (mass / mass.sum(0)).T
        sizes = [len(row) for row in drawn]
        for i, rows in enumerate(mass.split(sizes)):
            for j, part in enumerate(rows.split(sizes, 1)):
                assert float(scores[b, h, i, j]) == pytest.approx(float(part.sum(1).mean()), rel=1e-4)
    monkeypatch.setattr(select, "SCORES_AT_ONCE", 2 * 2 * blocks * tokens.shape[3] ** 2 * 3)
    torch.testing.assert_close(sampled_scores(q, k, tokens, layout.lengths(), scale=0.7), scores)


def test_all_tokens_drawn_is_the_true_mass():
    spec = TokenSpec(VideoGrid(3, 5, 7))
    layout = TokenLayout.build(spec, block=16)
    q, k = torch.randn(2, 1, 1, 105, 8)
    tokens = sample_tokens(layout.lengths(), 16, 64, heads=1)
    scores = sampled_scores(q, k, tokens, layout.lengths(), scale=1.0)
    attention = (q @ k.mT).softmax(-1)[0, 0]
    exact = torch.stack([torch.stack([p.sum(1).mean() for p in row.split(16, 1)]) for row in attention.split(16)])
    torch.testing.assert_close(scores[0, 0], exact)


def test_padded_text_without_a_token_gets_no_mass():
    layout = TokenLayout.build(TokenSpec(VideoGrid(1, 4, 8), 32), block=16)
    lengths = torch.tensor([[[16, 16, 16, 16]], [[16, 16, 3, 0]]])
    q = torch.randn(2, 2, 64, 8)
    scores = sampled_scores(q, q, sample_tokens(lengths, 16, 4, heads=2), lengths, scale=1.0)
    assert layout.num_blocks == 4 and scores.isfinite().all()
    assert (scores[1, :, :, 3] == 0).all() and (scores[1, :, 3] == 0).all()
    torch.testing.assert_close(scores[1, :, :3].sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(scores[0].sum(-1), torch.ones(2, 4))


def test_own_blocks():
    blocks = keep_own(torch.zeros(2, 1, 3, 6, dtype=torch.bool))
    assert blocks[1, 0].nonzero().tolist() == [[0, 0], [1, 2], [2, 4]]
    assert keep_own(torch.ones(3, 3, dtype=torch.bool)).all()


@pytest.mark.parametrize("text", [(0, False), (9, True), (9, False)], ids=str)
@pytest.mark.parametrize("order", ["raster", "token", "tile", "curve"])
def test_first_frame_blocks(text, order):
    spec = TokenSpec(VideoGrid(5, 6, 7), *text)
    layout = TokenLayout.build(spec, block=16, order=token_order(spec.grid, order))
    blocks = keep_first_frame(torch.zeros(1, 1, 14, 14, dtype=torch.bool), layout, spec)
    for n, block in enumerate(layout.index[0, : 14 * 16].split(16)):
        tokens = [t - spec.video.start for t in block.tolist() if t >= 0]
        assert (blocks[0, 0, :, n] == any(0 <= t < 42 for t in tokens)).all()
    assert blocks.any() and (order == "token" or not blocks.all())


class Sizes(TorchDispatchMode):
    """Note how many values each map of blocks in floating point holds."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks, self.seen = blocks, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() >= self.blocks**2:
                self.seen.append(x.numel())
        return out


@pytest.mark.parametrize(("rows", "columns", "more"), [(4, 4, 0), (4, 4, 2), (3, 7, 1)])
def test_text_does_not_hide_rows_without_video(rows, columns, more):
    blocks = torch.rand(2, 1, rows, columns) < torch.tensor([0, 0.5, 0, 1])[:rows, None]
    kept = keep_text(blocks, rows + more, columns + more)
    assert kept[..., rows:, :].all() and kept[..., columns:].all()
    video, empty = kept[..., :rows, :columns], ~blocks.any(-1)
    assert torch.equal(video[~empty], blocks[~empty])
    assert (video[empty].sum(-1) == 1).all() and video[:, :, 0, 0].all()


def test_tokens_are_drawn_alike_in_any_default_dtype():
    lengths = torch.tensor([16, 3, 0, 9])
    expected = sample_tokens(lengths, 16, 5, heads=3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(sample_tokens(lengths, 16, 5, heads=3), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_scores_of_all_heads_never_exist_at_once(monkeypatch):
    spec = TokenSpec(VideoGrid(4, 16, 24))
    q, k = torch.randn(2, 1, 7, spec.num_tokens, 4)
    method = get_method("draft", tile=(1, 4, 4))
    whole = method.pattern(q, k, AttentionCall(spec), MethodState()).mask.to_dense()
    monkeypatch.setattr(select, "SCORES_AT_ONCE", 3 * 96**2 - 1)
    with Sizes(96) as sizes:
        pattern = method.pattern(q, k, AttentionCall(spec), MethodState())
    maps = [n for n in sizes.seen if n % 96**2 == 0]
    assert len(maps) >= 8 and max(maps) == 2 * 96**2, "two heads fit at a time"
    assert torch.equal(pattern.mask.to_dense(), whole)


def test_heads_in_groups_are_put_together_again():
    chosen = torch.rand(2, 7, 3, 4) < 0.5
    for at_once in (1, 24, 48, 1000):
        seen = []

        def choose(part, seen=seen):
            seen.append(part)
            return chosen[:, part]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(select, "SCORES_AT_ONCE", at_once)
            assert torch.equal(by_heads(choose, 7, 24), chosen)
        assert len(seen) == {1: 7, 24: 7, 48: 4, 1000: 1}[at_once]
