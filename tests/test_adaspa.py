"""AdaSpa against an eager definition written from the paper."""

import itertools

import pytest
import test_methods
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdit
from fastdit.attention import MethodState, get_method, mass, select
from fastdit.attention.mass import block_mass
from fastdit.attention.methods import adaspa
from fastdit.attention.methods.adaspa import levels
from fastdit.layout import TokenLayout
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

GRIDS = [VideoGrid(1, 6, 10), VideoGrid(3, 9, 11), VideoGrid(2, 8, 16)]
TEXTS = [(0, False), (19, True), (19, False)]


def structured(spec, heads=4, batch=2, dim=16):
    """Heads that attend more and more evenly: the first to few keys, the last to all."""
    q, k = torch.randn(2, batch, heads, spec.num_tokens, dim).unbind()
    return q * torch.linspace(4, 0.3, heads)[:, None, None], k


class LargestTensor(TorchDispatchMode):
    """Count the elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def padding_of(spec):
    padding = torch.zeros(2, spec.num_tokens, dtype=torch.bool)
    for sample, real in enumerate([5, 18]):
        padding[sample, spec.text.start + real : spec.text.stop] = True
    return padding


def eager_mass(q, k, spec, block, scale, padding=None, lse=None):
    """A = softmax(QK^T), or exp(QK^T - LSE), summed over blocks; the video comes first, each part in its own blocks."""
    scores = q @ k.mT * scale
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None], -torch.inf)
    attention = scores.softmax(-1) if lse is None else (scores - lse[..., None]).exp()
    if padding is not None:
        attention = attention.masked_fill(padding[:, None, :, None], 0)
    parts = [torch.arange(spec.num_tokens)[part].split(block) for part in (spec.video, spec.text)]
    blocks = [tokens for part in parts for tokens in part if len(tokens)]
    rows = torch.stack([attention[:, :, tokens].sum(2) for tokens in blocks], 2)
    return torch.stack([rows[..., tokens].sum(-1) for tokens in blocks], 3), len(parts[0])


def eager_blocks(mass, video, lengths, density, adaptive=True, threshold=0.8):
    """Top-k of each row, recall, three budgets, top-k again: blocks of the video part, head by head."""
    batch, heads = mass.shape[:2]
    base = max(1, int(density * video + 0.5))

    def top(b, h, count):
        weights = mass[b, h, :video, :video] / lengths[:video]
        kept = torch.zeros(video, video, dtype=torch.bool)
        for row in range(video):
            for column in sorted(range(video), key=lambda j: (-float(weights[row, j]), j))[:count]:
                kept[row, column] = True
        return kept

    out = torch.stack([torch.stack([top(b, h, base) for h in range(heads)]) for b in range(batch)])
    if not adaptive:
        return out
    for b in range(batch):
        whole = torch.ones_like(mass[b], dtype=torch.bool)
        whole[:, :video, :video] = out[b]
        recall = (mass[b] * whole).sum((1, 2)) / mass[b].sum((1, 2))
        givers = min(int((recall > threshold).sum()), heads // 2)
        ranked = sorted(range(heads), key=lambda h: (-float(recall[h]), h))
        for place, h in enumerate(ranked):
            if place < givers:
                out[b, h] = top(b, h, base - min(base // 2, video - base))
            elif place >= heads - givers:
                out[b, h] = top(b, h, base + min(base // 2, video - base))
    return out


@pytest.mark.parametrize("chunk", [1, 1 << 25], ids=["one row at a time", "whole heads"])
@pytest.mark.parametrize(("grid", "text"), list(itertools.product(GRIDS, TEXTS)), ids=str)
def test_mass_is_the_attention_map_summed_over_blocks(grid, text, chunk, monkeypatch, poisoned_empty):
    monkeypatch.setattr(mass, "MAX_ENTRIES", chunk)
    spec = TokenSpec(grid, *text)
    q, k = structured(spec)
    padding = padding_of(spec) if spec.text_tokens else None
    layout = TokenLayout.build(spec, block=16)
    lengths = layout.lengths()[None] if padding is None else layout.lengths_without(padding)
    for lse in (None, torch.randn(2, 4, spec.num_tokens) + 3):
        expected, _ = eager_mass(q.double(), k.double(), spec, 16, 0.2, padding, lse)
        laid_out = None if lse is None else layout.apply(lse[..., None])[..., 0]
        shapes = {"scale": 0.2, "block": 16, "lengths_q": lengths, "lengths_k": lengths}
        found = block_mass(layout.apply(q), layout.apply(k), laid_out, **shapes)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


def test_padding_does_not_count(poisoned_empty):
    """What padding holds does not matter, not even to a sum with a log-sum-exp of its own."""
    q, k, lse = torch.randn(1, 1, 40, 8), torch.randn(1, 1, 40, 8), torch.randn(1, 1, 40)
    lengths = torch.tensor([[[16, 5, 8]]])
    real = (torch.arange(16) < lengths[..., None]).flatten()[:40]
    dirty = [x.masked_fill(~real[:, None], torch.nan) for x in (q, k)]
    shapes = {"scale": 0.3, "block": 16, "lengths_q": lengths, "lengths_k": lengths}
    dirty_lse = lse.masked_fill(~real, torch.nan)
    torch.testing.assert_close(block_mass(*dirty, dirty_lse, **shapes), block_mass(q, k, lse, **shapes))


def test_mass_of_half_precision_is_summed_in_single():
    q, k = structured(TokenSpec(VideoGrid(2, 8, 16)))
    lengths = torch.full((1, 1, 4), 64)
    shapes = {"scale": 0.25, "block": 64, "lengths_q": lengths, "lengths_k": lengths}
    half = [x.bfloat16() for x in (q, k)]
    torch.testing.assert_close(
        block_mass(*half, None, **shapes), block_mass(*(x.float() for x in half), None, **shapes)
    )


@pytest.mark.parametrize("cached", [True, False])
def test_mass_takes_memory_for_a_few_rows_only(cached, monkeypatch):
    """No tensor of the map's own size: 2048 x 2048 entries, in pieces of at most 2 rows of blocks."""
    monkeypatch.setattr(mass, "MAX_ENTRIES", 2 * 64 * 2048)
    q, k = torch.randn(2, 1, 1, 2048, 8).unbind()
    lengths, lse = torch.full((1, 1, 32), 64), torch.randn(1, 1, 2048) if cached else None
    with LargestTensor() as largest:
        block_mass(q, k, lse, scale=0.3, block=64, lengths_q=lengths, lengths_k=lengths)
    assert 64 * 2048 <= largest.elements <= 2 * 64 * 2048


def test_heads_are_searched_a_few_at_a_time(monkeypatch):
    """One map of blocks at a time gives what all of them give, in one byte for each pair that stays."""
    spec = TokenSpec(VideoGrid(3, 9, 11), 19)
    q, k = structured(spec, heads=5)
    call, found = AttentionCall(spec, key_padding=padding_of(spec)), []
    for scores in (1, 1 << 24):
        monkeypatch.setattr(select, "SCORES_AT_ONCE", scores)
        method = get_method("adaspa", density=0.3, block_size=16, recall_threshold=0.3)
        found.append(method.pattern(q, k, call, MethodState()).mask)
    assert torch.equal(found[0].to_dense(), found[1].to_dense())
    assert found[0].counts[:, :, 0].unique().numel() == 3


@pytest.mark.parametrize(("density", "adaptive"), [(0.1, True), (0.3, False), (0.8, True)])
@pytest.mark.parametrize(("grid", "text"), list(itertools.product(GRIDS, TEXTS)), ids=str)
def test_first_search_follows_the_paper(grid, text, density, adaptive):
    spec = TokenSpec(grid, *text)
    q, k = structured(spec)
    padding = padding_of(spec) if spec.text_tokens else None
    method = get_method("adaspa", density=density, block_size=16, adaptive=adaptive)
    pattern = method.pattern(q, k, AttentionCall(spec, scale=0.25, key_padding=padding), MethodState())
    expected, video = eager_mass(q.double(), k.double(), spec, 16, 0.25, padding)
    lengths = pattern.mask.lengths_q[0, 0]
    found = pattern.mask.to_dense()
    assert torch.equal(found[..., :video, :video], eager_blocks(expected, video, lengths, density, adaptive))
    assert found[..., video:, :].all() and found[..., :, video:].all()


def test_first_call_of_a_video_is_exact_dense_attention(poisoned_empty):
    spec = TokenSpec(VideoGrid(3, 9, 11), 7, text_first=True)
    call = AttentionCall(spec, scale=0.3)
    q, k, v = test_methods.qkv(spec, batch=2)
    method, state = get_method("adaspa", density=0.2, block_size=16), MethodState()
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(method.forward(q, k, v, call, state), dense)
    assert float(state.kept) == 1
    first, state.refresh = state.pattern, False
    torch.testing.assert_close(
        method.forward(q, k, v, call, state), test_methods.reference(q * 0.3 * 4, k, v, first), rtol=1e-4, atol=1e-5
    )
    assert state.pattern is first and float(state.kept) == pytest.approx(first.density) and first.density < 0.6
    state.reset()
    torch.testing.assert_close(method.forward(q, k, v, call, state), dense)
    assert float(state.kept) == 1


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_later_searches_reuse_the_log_sum_exp(text, monkeypatch):
    """Old LSE, current q and k, and no attention but the sparse one."""
    spec = TokenSpec(VideoGrid(3, 9, 11), *text)
    call = AttentionCall(spec)
    q, k = structured(spec)
    method, state = get_method("adaspa", density=0.3, block_size=16), MethodState()
    method.forward(q, k, torch.randn_like(q), call, state)
    lse = (q.double() @ k.double().mT / 4).logsumexp(-1)
    q = q + torch.randn_like(q)
    kept = []
    door = adaspa.block_sparse_attention
    monkeypatch.setattr(adaspa, "block_sparse_attention", lambda *a, **k: kept.append(a) or door(*a, **k))
    method.forward(q, k, torch.randn_like(q), call, state)
    assert kept == []
    old, video = eager_mass(q.double(), k.double(), spec, 16, 0.25, lse=lse)
    found = state.pattern.mask.to_dense()[..., :video, :video]
    lengths = state.pattern.mask.lengths_q[0, 0]
    assert torch.equal(found, eager_blocks(old, video, lengths, 0.3))
    new, _ = eager_mass(q.double(), k.double(), spec, 16, 0.25)
    assert not torch.equal(found, eager_blocks(new, video, lengths, 0.3))


def test_another_video_is_searched_from_the_start():
    method, state = get_method("adaspa", block_size=16), MethodState(refresh=False)
    for grid, batch in [((2, 8, 12), 2), ((2, 12, 8), 2), ((2, 12, 8), 1), ((2, 12, 8), 2)]:
        call = AttentionCall(TokenSpec(VideoGrid(*grid)))
        q, k, v = test_methods.qkv(call.tokens, batch=batch)
        out = method.forward(q, k, v, call, state)
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
        assert state.pattern.mask.indices.shape[0] == batch and state.tokens == call.tokens


@pytest.mark.parametrize("heads", [1, 2, 5, 8])
def test_as_many_heads_get_as_give(heads):
    recall = torch.rand(3, heads)
    found = levels(recall, 0.6)
    for sample in range(3):
        givers = min(int((recall[sample] > 0.6).sum()), heads // 2)
        ranked = found[sample][recall[sample].argsort(descending=True)].tolist()
        assert ranked == [-1] * givers + [0] * (heads - 2 * givers) + [1] * givers


def test_heads_with_equal_recall_give_in_their_order():
    assert levels(torch.full((1, 4), 0.9), 0.8).tolist() == [[-1, -1, 1, 1]]
    assert levels(torch.full((1, 4), 0.8), 0.8).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize(("density", "low", "high"), [(0.2, 0.1, 0.3), (0.5, 0.25, 0.75), (0.9, 0.8, 1.0), (1, 1, 1)])
def test_three_budgets_with_the_density_as_their_average(density, low, high):
    """d / 2 and 3/2 d, which are sparsities (1 + s) / 2 and (3 s - 1) / 2; above 2/3 what is left."""
    s = 1 - density
    if density <= 2 / 3:
        assert (1 - low, 1 - high) == pytest.approx(((1 + s) / 2, (3 * s - 1) / 2))
    spec = TokenSpec(VideoGrid(5, 8, 8))
    q, k = torch.randn(2, 1, 3, spec.num_tokens, 16).unbind()
    q = q * torch.tensor([4.0, 1.0, 0.01])[:, None, None]
    method = get_method("adaspa", density=density, block_size=16, recall_threshold=0.05)
    mask = method.pattern(q, k, AttentionCall(spec), MethodState()).mask
    assert [mask.counts[0, h].unique().tolist() for h in range(3)] == [[20 * low], [20 * density], [20 * high]]
    assert mask.density == pytest.approx(density)


def test_a_block_that_is_cut_off_competes_by_what_its_keys_weigh():
    """One key in the last block, with more weight than any other: it is kept, although its block's sum is small."""
    spec = TokenSpec(VideoGrid(1, 1, 65))
    q, k = torch.zeros(1, 1, 65, 4), torch.zeros(1, 1, 65, 4)
    q[..., 0], k[0, 0, 64, 0] = 1, 1
    pattern = get_method("adaspa", density=0.2, block_size=16).pattern(q, k, AttentionCall(spec), MethodState())
    assert pattern.mask.to_dense()[0, 0].tolist() == [[False] * 4 + [True]] * 5


def test_recall_decides_who_gives():
    """The sharp head keeps its mass with half of the blocks, whichever head it is."""
    spec = TokenSpec(VideoGrid(4, 8, 8))
    q, k = torch.randn(2, 1, 2, spec.num_tokens, 16).unbind()
    method = get_method("adaspa", density=0.25, block_size=16, recall_threshold=0.3)
    for sharpness in ([4.0, 0.01], [0.01, 4.0]):
        scaled = q * torch.tensor(sharpness)[:, None, None]
        mask = method.pattern(scaled, k, AttentionCall(spec), MethodState()).mask
        assert [mask.counts[0, h].unique().tolist() for h in range(2)] == [[2 if x > 1 else 6] for x in sharpness]


def test_searches_of_a_run_are_those_of_the_schedule(monkeypatch):
    """Four steps, searched at 0 and 2: full attention at the first alone, and each branch for itself."""
    pipe = tiny.pipeline("wan", layers=1)
    pipe.enable_sparse_attention("adaspa", density=0.3, block_size=16, schedule=fastdit.Schedule(refresh_steps=(0, 2)))
    calls, searches = [], []
    forward, search = adaspa.AdaSpa.forward, adaspa.block_mass

    def spy(self, q, k, v, call, state):
        searches.clear()
        out = forward(self, q, k, v, call, state)
        calls.append((call.step, call.branch, len(searches), round(float(state.kept), 2)))
        return out

    monkeypatch.setattr(adaspa.AdaSpa, "forward", spy)
    monkeypatch.setattr(adaspa, "block_mass", lambda *a, **k: searches.append(1) or search(*a, **k))
    tiny.run(pipe, steps=4)
    video = list(calls)
    assert [call[:3] for call in video] == [(s, b, s in (0, 2)) for s in range(4) for b in ("cond", "uncond")]
    assert [call[3] == 1 for call in video] == [True] * 2 + [False] * 6
    assert all(call[3] == pytest.approx(0.3, abs=0.05) for call in video[2:])
    tiny.run(pipe, steps=4)
    assert calls[len(video) :] == video


def test_masks_without_padding_live_as_long_as_their_patterns():
    """A video that keeps its padding and searches at every step holds one mask, not one for each step."""
    spec = TokenSpec(VideoGrid(2, 4, 8), 19)
    call = AttentionCall(spec, key_padding=padding_of(spec))
    method, state = get_method("adaspa", block_size=16), MethodState()
    for _ in range(4):
        q, k, v = test_methods.qkv(spec, batch=2)
        method.forward(q, k, v, call, state)
        assert len(state.cache.shortened) <= 1 and len(state.cache.entries) == 1


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "0.8"])
def test_bad_recall_threshold(value):
    with pytest.raises(ValueError, match=r"recall_threshold must be in \[0, 1\]"):
        get_method("adaspa", recall_threshold=value)
