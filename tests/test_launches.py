"""A table runs in few launches, copies no more than it has to, and builds nothing twice."""

import gc
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from test_table import BUILT, DENSE, METHODS, ROW, Nothing, Own, Stripes, qkv, table

from fastdit.attention import MethodState, get_method
from fastdit.attention.kernels import block_sparse_attention
from fastdit.attention.pattern import merge_heads, pattern_of
from fastdit.attention.per_head import head_groups as launches
from fastdit.attention.per_head.table import Table
from fastdit.layout import TokenLayout
from fastdit.mask import BlockMask
from fastdit.schedule import step_bucket
from fastdit.token_orders import token_order
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid


@pytest.fixture(autouse=True)
def _no_builds():
    BUILT.clear()


def test_few_launches(monkeypatch):
    seen = []

    def counted(q, k, v, mask, **options):
        seen.append((q.shape[1], options["compensate"]))
        return block_sparse_attention(q, k, v, mask, **options)

    monkeypatch.setattr("fastdit.attention.method.block_sparse_attention", counted)
    spec = TokenSpec(VideoGrid(3, 9, 11))
    q, k, v = qkv(spec)
    table(ROW).forward(q, k, v, AttentionCall(spec), MethodState())
    # raster order in blocks of 16 (radial, both stripes, both heaviest); compensated; tiles; curve. Dense is no launch.
    assert Counter(seen) == {(6, None): 1, (2, None): 1, (1, None): 1, (1, "mean"): 1}
    seen.clear()
    table(tuple([2] * 13)).forward(q, k, v, AttentionCall(spec), MethodState())
    table(tuple([0] * 13)).forward(q, k, v, AttentionCall(spec), MethodState())
    table(tuple([9] * 13)).forward(q, k, v, AttentionCall(spec), MethodState())
    assert seen == [(13, None)]


@pytest.mark.parametrize(("row", "shared"), [((1, 0, 0, 1), (True, False)), ((1, 1, 0, 0), (True, True))])
def test_ranges_of_heads_are_not_copied(row, shared):
    same = {}

    @dataclass(frozen=True, kw_only=True)
    class Watch(Own):
        number: int

        def check(self, q, k, v, call):
            same[self.number] = all(
                x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
                for x, y in zip((q, k, v), whole, strict=True)
            )

    spec = TokenSpec(VideoGrid(1, 6, 10))
    whole = qkv(spec, heads=4)
    table(row, methods=(Watch(number=0), Watch(number=1))).forward(*whole, AttentionCall(spec), MethodState())
    assert (same[0], same[1]) == shared


def test_static_patterns_are_built_once_for_all_layers():
    spec = TokenSpec(VideoGrid(3, 9, 11))
    q, k, v = qkv(spec, heads=4)
    rows = [(3, 4, 4, 3), (4, 3, 3, 3), (3, 4, 4, 3)]
    method, first = table(*rows), MethodState()
    states = {(layer, branch): MethodState(cache=first.cache) for layer in range(3) for branch in ("cond", "uncond")}
    built = []
    from_dense, merge = BlockMask.from_dense, merge_heads
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockMask, "from_dense", lambda *a, **b: built.append("mask") or from_dense(*a, **b))
        patch.setattr(launches, "merge_heads", lambda parts: built.append("merge") or merge(parts))
        for step in range(3):
            for (layer, branch), state in states.items():
                state.refresh = True
                method.forward(q, k, v, AttentionCall(spec, layer, 3, step, 3, branch), state)
    assert BUILT == {("stripes", 3): 1, ("stripes", 2): 1}
    assert Counter(built) == {"mask": 2, "merge": 2}  # two of the rows are alike


def test_static_heads_beside_dynamic_ones_are_merged_once(monkeypatch):
    spec = TokenSpec(VideoGrid(3, 9, 11))
    merges, merge = [], merge_heads
    monkeypatch.setattr(launches, "merge_heads", lambda parts: merges.append(len(parts)) or merge(parts))
    state, method = MethodState(), table((3, 4, 2, 3))
    for step in range(4):
        method.forward(*qkv(spec, heads=4), AttentionCall(spec, step=step), state)
    assert merges == [2]


def test_dynamic_patterns_are_rebuilt_when_the_schedule_says_so():
    spec = TokenSpec(VideoGrid(3, 9, 11))
    method = Table(edges=(0.5, 1.0), methods=(*METHODS, DENSE), choices=(((6, 7, 0, 6, 3),), ((6, 7, 6, 0, 3),)))
    q, k, v = qkv(spec, heads=5)
    state, outs = MethodState(), []
    for step in range(8):
        state.refresh = step in (0, 3)
        x = qkv(spec, heads=5) if step == 3 else (q, k, v)
        outs.append(method.forward(*x, AttentionCall(spec, 0, 1, step, 8), state))
    # both groups at steps 0 and 3; in the second bucket the first method has other heads, so it chooses for them
    assert BUILT == {("heaviest", 2): 3, ("heaviest", 1): 2, ("stripes", 3): 1}
    torch.testing.assert_close(outs[0], outs[2])
    assert not torch.equal(outs[0][:, 1], outs[5][:, 1])  # the blocks are those of step 3
    state.reset()
    state.refresh = False
    method.forward(q, k, v, AttentionCall(spec, 0, 1, 0, 8), state)
    assert BUILT["heaviest", 1] == 3
    other = TokenSpec(VideoGrid(2, 9, 11))
    method.forward(*qkv(other, heads=5), AttentionCall(other, 0, 1, 1, 8), state)
    assert BUILT["heaviest", 1] == 4


def test_wan_at_its_real_size():
    """Wan 2.1 1.3B at 480p: 30 layers of 12 heads in three buckets, planned for a video without computing attention."""
    spec = TokenSpec(VideoGrid(21, 30, 52))
    methods = (DENSE, *(Stripes(block_size=128, every=n) for n in (2, 4, 8)), get_method("radial"), Nothing())
    choices = torch.randint(len(methods), (3, 30, 12)).tolist()
    method = Table(
        edges=(0.2, 0.6, 1.0), methods=methods, choices=tuple(tuple(map(tuple, bucket)) for bucket in choices)
    )
    q = k = torch.zeros(1, 1, 1, 1).expand(1, 12, spec.num_tokens, 1)
    first = MethodState()
    states = [MethodState(cache=first.cache) for _ in range(30)]
    runs = []
    for step in (0, 1, 5, 6, 20, 21):
        for layer, state in enumerate(states):
            call = AttentionCall(spec, layer, 30, step, 25)
            planned = method._heads(q, k, call, state).launches(method.groups(call, 12))
            covered = sorted(head for launch in planned for head in launch.heads)
            row = choices[step_bucket(method.edges, step, 25)][layer]
            assert covered == [head for head in range(12) if row[head] != 5]
            assert len(planned) <= 2  # dense, and all that is listed in raster order
            runs.append([launch.state.pattern for launch in planned if launch.state.pattern is not None])
    assert all(count == 1 for count in BUILT.values()) and len(BUILT) == 3
    for step in (0, 2, 4):
        for one, two in zip(runs[30 * step : 30 * step + 30], runs[30 * step + 30 : 30 * step + 60], strict=True):
            assert len(one) == len(two) and all(a is b for a, b in zip(one, two, strict=True))


def test_patterns_of_a_few_sizes_are_kept():
    state, method = MethodState(), table((3, 3))
    for frames in (1, 2, 1, 2, 3, 3, 2, 1):
        spec = TokenSpec(VideoGrid(frames, 6, 10))
        method.forward(*qkv(spec, heads=2), AttentionCall(spec), state)
    assert BUILT == {("stripes", 3): 4}  # the first size again, after two others


def test_orders_are_the_same_by_content():
    spec = TokenSpec(VideoGrid(3, 4, 5), 3)

    def pattern(order, heads=1, block=16):
        layout = TokenLayout.build(spec, block=block, order=token_order(spec.grid, order).repeat(heads, 1))
        return pattern_of(layout, torch.ones(layout.video_blocks, layout.video_blocks, dtype=torch.bool))

    shared = launches.SharedPatterns()
    assert shared.kind(pattern("raster")) == shared.kind(pattern("fhw"))
    kinds = [pattern("raster"), pattern("hwf"), pattern("raster", block=32), pattern("raster", 2), pattern("raster", 2)]
    assert len({shared.kind(kind) for kind in kinds}) == len(kinds)
    gone = shared.kind(pattern("curve"))
    gc.collect()
    assert len(shared.numbers) == 3  # orders of all heads, as long as somebody has them
    assert shared.kind(kinds[0]) == shared.kind(pattern("raster"))
    assert gone not in {shared.kind(pattern(order)) for order in ("curve", "token", "tile", "whf")}


def test_any_number_of_orders():
    """Each of many heads runs in an order of its own, and heads of one order run together."""
    spec = TokenSpec(VideoGrid(4, 5, 6))
    tiles = [(f, h, w) for f in (1, 2, 3) for h in range(1, 6) for w in range(1, 7)]
    orders = {tuple(token_order(spec.grid, "tile", tile).tolist()): tile for tile in tiles}
    methods = [get_method("diagonal", order="tile", tile=t, density=0.3, block_size=16) for t in orders.values()][:68]
    assert len(methods) == 68
    row = (*range(68), 3, 2, 1)
    q, k, v = qkv(spec, heads=len(row))
    method, call, state = table(row, methods=tuple(methods)), AttentionCall(spec), MethodState()
    expected = [methods[i].forward(*(x[:, [h]] for x in (q, k, v)), call, MethodState()) for h, i in enumerate(row)]
    torch.testing.assert_close(method.forward(q, k, v, call, state), torch.cat(expected, 1), rtol=1e-4, atol=1e-5)
    assert len(method._heads(q, k, call, state).launches(method.groups(call, len(row)))) == 68


def test_too_long_lists_are_not_merged(monkeypatch):
    spec = TokenSpec(VideoGrid(3, 9, 11))
    q, k, _ = qkv(spec, heads=3)
    method, call = table((3, 4, 3)), AttentionCall(spec)
    assert [launch.heads for launch in method._heads(q, k, call, MethodState()).launches(method.groups(call, 3))] == [
        (0, 1, 2)
    ]
    monkeypatch.setattr(launches, "MAX_MERGED", 10)
    assert [launch.heads for launch in method._heads(q, k, call, MethodState()).launches(method.groups(call, 3))] == [
        (0, 2),
        (1,),
    ]
