"""A table of methods per head equals each head run by itself, in few launches and without rebuilding anything."""

import copy
import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from fastdit.attention import AttentionMethod, BlockMethod, MethodState, Pattern, get_method, launches
from fastdit.attention.kernels import block_sparse_attention
from fastdit.attention.ordered import OrderedMethod, pattern_of
from fastdit.attention.table import Table, method_label
from fastdit.mask import BlockMask
from fastdit.schedule import step_bucket
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

BUILT = Counter()


@pytest.fixture(autouse=True)
def _no_builds():
    BUILT.clear()


@dataclass(frozen=True, kw_only=True)
class Stripes(OrderedMethod):
    """Keep every n-th block; static."""

    static: ClassVar[bool] = True
    name: ClassVar[str] = "stripes"
    every: int = 2

    def pattern(self, q, k, call, state):
        BUILT["stripes", self.every] += 1
        layout = self.layout(call, q.device, state)
        count = torch.arange(layout.video_blocks)
        return pattern_of(layout, (count[:, None] - count) % self.every == 0)


@dataclass(frozen=True, kw_only=True)
class Heaviest(OrderedMethod):
    """Keep the blocks whose first keys are largest for the first queries; dynamic, and different for each head."""

    name: ClassVar[str] = "heaviest"
    share: float = 0.5

    def pattern(self, q, k, call, state):
        BUILT["heaviest", q.shape[1]] += 1
        layout = self.layout(call, q.device, state)
        q, k = (layout.apply(x)[:, :, :: self.block_size][:, :, : layout.video_blocks] for x in (q, k))
        scores = q @ k.mT
        return pattern_of(layout, scores >= scores.flatten(2).quantile(1 - self.share, -1)[..., None, None])


@dataclass(frozen=True, kw_only=True)
class Nothing(AttentionMethod):
    """Compute nothing; running it is an error."""

    name: ClassVar[str] = "nothing"
    empty: ClassVar[bool] = True

    def pattern(self, q, k, call, state):
        raise AssertionError

    def forward(self, q, k, v, call, state):
        raise AssertionError


@dataclass(frozen=True, kw_only=True)
class Own(AttentionMethod):
    """Return the values times the number of the head in the layer, plus 100 for each earlier call of this video."""

    name: ClassVar[str] = "own"

    def pattern(self, q, k, call, state):
        raise AssertionError

    def forward(self, q, k, v, call, state):
        state.memory["calls"] = state.memory.get("calls", -1) + 1
        state.kept = torch.tensor(0.25)
        self.check(q, k, v, call)
        return v * torch.tensor(call.heads)[:, None, None] + 100 * state.memory["calls"]

    def check(self, q, k, v, call):
        assert q.shape[1] == k.shape[1] == v.shape[1] == len(call.heads)


DENSE = get_method("dense")
RADIAL = get_method("radial", block_size=16)
METHODS = (
    DENSE,
    RADIAL,
    get_method("draft", tile=(1, 4, 4), density=0.4),
    Stripes(block_size=16, every=3),
    Stripes(block_size=16, every=2),
    Stripes(block_size=16, every=2, compensate="mean"),
    Heaviest(block_size=16),
    Heaviest(block_size=16, share=0.2),
    Stripes(block_size=32, order="curve"),
    Nothing(),
)
ROW = (3, 0, 7, 9, 1, 2, 6, 4, 0, 8, 5, 2, 7)


def table(*rows, methods=METHODS, edges=(1.0,)):
    return Table(edges=edges, methods=methods, choices=tuple(tuple(rows) for _ in edges))


def qkv(spec, batch=1, heads=13, dim=8):
    return tuple(torch.randn(batch, heads, spec.num_tokens, dim) for _ in range(3))


def alone(method, head, q, k, v, call):
    """The output of one head and its density, by its method run by itself."""
    if method.empty:
        return torch.zeros_like(v[:, head]), 0.0
    state = MethodState()
    out = method.forward(*(x[:, head : head + 1] for x in (q, k, v)), call, state)
    return out[:, 0], float(state.kept)


@pytest.mark.parametrize("merged", [0, launches.MAX_MERGED], ids=["apart", "merged"])
@pytest.mark.parametrize("grid", [VideoGrid(3, 9, 11), VideoGrid(1, 6, 10)], ids=str)
@pytest.mark.parametrize(
    ("text", "first", "padded"),
    [(0, False, False), (11, True, False), (11, False, True)],
    ids=["none", "first", "last"],
)
def test_each_head_is_computed_by_its_method(grid, text, first, padded, merged, poisoned_empty, monkeypatch):
    monkeypatch.setattr(launches, "MAX_MERGED", merged)
    spec = TokenSpec(grid, text, first)
    padding = torch.zeros(2, spec.num_tokens, dtype=torch.bool)
    padding[0, -6:], padding[1, -2:] = True, True
    call = AttentionCall(spec, scale=0.4, key_padding=padding if padded else None)
    q, k, v = qkv(spec, batch=2)
    state = MethodState()
    out = table(ROW).forward(q, k, v, call, state)
    expected = [alone(METHODS[i], head, q, k, v, call) for head, i in enumerate(ROW)]
    torch.testing.assert_close(out, torch.stack([x for x, _ in expected], 1), rtol=1e-4, atol=1e-5)
    assert float(state.kept) == pytest.approx(sum(kept for _, kept in expected) / len(ROW), rel=1e-5)
    assert (out[:, 3] == 0).all()


def test_few_launches(monkeypatch):
    seen = []

    def counted(q, k, v, mask, **options):
        seen.append((q.shape[1], options["compensate"]))
        return block_sparse_attention(q, k, v, mask, **options)

    monkeypatch.setattr("fastdit.attention.base.block_sparse_attention", counted)
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


def test_all_heads_empty_are_zeros(poisoned_empty):
    spec = TokenSpec(VideoGrid(1, 6, 10))
    q, k, v = qkv(spec)
    state = MethodState()
    assert (table(tuple([9] * 13)).forward(q, k, v, AttentionCall(spec), state) == 0).all() and float(state.kept) == 0


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


def test_methods_with_a_forward_of_their_own_remember():
    spec = TokenSpec(VideoGrid(1, 6, 10))
    q, k, v = qkv(spec, heads=5)
    state = MethodState()
    method = table((0, 1, 0, 1, 1), methods=(Own(), DENSE))
    for step in range(3):
        out = method.forward(q, k, v, AttentionCall(spec, step=step), state)
        torch.testing.assert_close(out[:, 0], v[:, 0] * 0 + 100 * step)
        torch.testing.assert_close(out[:, 2], v[:, 2] * 2 + 100 * step)
        assert float(state.kept) == pytest.approx((2 * 0.25 + 3) / 5)
    state.reset()
    torch.testing.assert_close(method.forward(q, k, v, AttentionCall(spec), state)[:, 0], v[:, 0] * 0)


def test_static_patterns_are_built_once_for_all_layers():
    spec = TokenSpec(VideoGrid(3, 9, 11))
    q, k, v = qkv(spec, heads=4)
    rows = [(3, 4, 4, 3), (4, 3, 3, 3), (3, 4, 4, 3)]
    method, first = table(*rows), MethodState()
    states = {(layer, branch): MethodState(cache=first.cache) for layer in range(3) for branch in ("cond", "uncond")}
    built = []
    from_dense, merge = BlockMask.from_dense, launches.merge_heads
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
    merges, merge = [], launches.merge_heads
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


def test_patterns_of_groups_and_of_all():
    spec = TokenSpec(VideoGrid(3, 9, 11))
    q, k, _ = qkv(spec, heads=4)
    call, state = AttentionCall(spec), MethodState()
    method = table((3, 4, 6, 3))
    found = dict(method.patterns(q, k, call, state))
    assert set(found) == {(0, 3), (1,), (2,)}
    whole = method.pattern(q, k, call, state)
    assert isinstance(whole, Pattern) and whole.mask.indices.shape[1] == 4
    blocks = whole.mask.to_dense()
    for heads, pattern in found.items():
        assert torch.equal(blocks[:, list(heads)], pattern.mask.to_dense().expand(-1, len(heads), -1, -1))
    assert whole.density == pytest.approx(sum(len(h) * p.density for h, p in found.items()) / 4, rel=1e-6)
    with pytest.raises(ValueError, match="use patterns"):
        table((3, 2, 3, 3)).pattern(q, k, call, MethodState())


def test_gradients_flow():
    spec = TokenSpec(VideoGrid(1, 6, 10))
    call = AttentionCall(spec)
    q, k, v = (x.requires_grad_() for x in qkv(spec))
    table(ROW).forward(q, k, v, call, MethodState()).square().sum().backward()
    got = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    sum(alone(METHODS[i], head, q, k, v, call)[0].square().sum() for head, i in enumerate(ROW)).backward()
    for x, grad in zip((q, k, v), got, strict=True):
        torch.testing.assert_close(grad, x.grad, rtol=1e-3, atol=1e-5)


def test_settings_reach_every_method():
    parts = []
    spec = TokenSpec(VideoGrid(3, 9, 11))
    state = MethodState(kernel="reference", measure=lambda part, device, run: parts.append(part) or run())
    table(ROW).forward(*qkv(spec), AttentionCall(spec), state)
    known = state.memory["groups"].states.values()
    assert {s.kernel for s in known} == {"reference"} and {s.precision for s in known} == {None}
    assert {"choice", "order"} == set(parts)
    with pytest.raises(ValueError, match="unknown kernel 'none'"):
        table(ROW).forward(*qkv(spec), AttentionCall(spec), MethodState(kernel="none"))


def test_buckets_are_fractions_of_the_run():
    edges = (0.2, 0.6, 1.0)
    assert [step_bucket(edges, step, 10) for step in range(10)] == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert [step_bucket(edges, step, 50) for step in (9, 10, 29, 30, 49, 60)] == [0, 1, 1, 2, 2, 2]
    assert [step_bucket(edges, step, 1) for step in (0,)] == [1]
    assert step_bucket((1.0,), 7, None) == 0
    with pytest.raises(ValueError, match="which of 3 step buckets"):
        step_bucket(edges, 0, None)


def test_it_is_a_frozen_value():
    one, two = table(ROW), table(ROW)
    assert one == two and hash(one) == hash(two) == hash(copy.deepcopy(one)) and one != table(ROW[::-1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.edges = (1.0,)
    assert dataclasses.replace(one, edges=(1.0,)) == one
    assert one.name == "table" and not one.static and not one.stock and isinstance(one, AttentionMethod)
    assert not isinstance(one, BlockMethod)
    short = repr(one)
    assert short.startswith("Table(1 buckets, 1 layers, 13 heads: 15% dense, ") and len(short) < 600
    assert one.describe()["methods"]["dense"] == 0.1538
    assert method_label(METHODS[3]) == "stripes(block_size=16, every=3)" and method_label(DENSE) == "dense"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"edges": (0.5,)}, ValueError, "ascending to 1"),
        ({"edges": (0.5, 0.2, 1)}, ValueError, "ascending to 1"),
        ({"edges": ()}, ValueError, "ascending to 1"),
        ({"edges": (0.5, 1.0)}, ValueError, "each of 2 buckets"),
        ({"choices": (((0, 1), (0,)),)}, ValueError, "as many layers and heads"),
        ({"choices": ((),)}, ValueError, "as many layers and heads"),
        ({"choices": (((0, 10),),)}, ValueError, r"indices of 10 methods, got \[10\]"),
        ({"choices": (((0, -1),),)}, ValueError, "indices of 10 methods"),
        ({"methods": ("dense",)}, TypeError, "methods must be methods"),
    ],
)
def test_tables_that_make_no_sense(change, error, message):
    with pytest.raises(error, match=message):
        Table(**({"edges": (1.0,), "methods": METHODS, "choices": (((0, 1),),)} | change))


def test_a_call_of_another_model():
    spec = TokenSpec(VideoGrid(1, 6, 10))
    with pytest.raises(ValueError, match="for 1 layers of 13 heads, got a call of a model with 1 layers of 2 heads"):
        table(ROW).forward(*qkv(spec, heads=2), AttentionCall(spec), MethodState())
    with pytest.raises(ValueError, match="with 4 layers of 13 heads"):
        table(ROW).forward(*qkv(spec), AttentionCall(spec, num_layers=4), MethodState())
