"""A table of methods per head equals each head run by itself, in few launches and without rebuilding anything."""

import copy
import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import test_methods
import torch

from fastdit.attention import AttentionMethod, BlockMethod, MethodState, Pattern, get_method, list_methods
from fastdit.attention.ordered import OrderedMethod
from fastdit.attention.pattern import pattern_of
from fastdit.attention.per_head import head_groups as launches
from fastdit.attention.per_head.table import Table, method_label
from fastdit.schedule import step_bucket
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

BUILT = Counter()


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


@pytest.mark.parametrize("name", list_methods())
def test_any_method_may_be_in_a_table(name):
    spec = TokenSpec(VideoGrid(3, 9, 11), 5, True)
    q, k, v = qkv(spec, heads=3)
    fields = {"adaptive": False} if name == "adaspa" else {}  # else its heads share their blocks
    method = test_methods.small(name, q, k, AttentionCall(spec), **fields)
    state, own = MethodState(), {0: MethodState(), 2: MethodState()}
    for step in range(2):
        call = AttentionCall(spec, step=step)
        out = table((0, 1, 0), methods=(method, DENSE)).forward(q, k, v, call, state)
        for head, memory in own.items():
            memory.refresh = state.refresh
            x = (x[:, head : head + 1] for x in (q, k, v))
            expected = method.forward(*x, dataclasses.replace(call, heads=(head,)), memory)
            torch.testing.assert_close(out[:, head : head + 1], expected, rtol=1e-4, atol=1e-5)
        kept = sum(float(memory.kept) for memory in own.values())
        assert float(state.kept) == pytest.approx((kept + 1) / 3, rel=1e-5)
        state.refresh = False


def test_all_heads_empty_are_zeros(poisoned_empty):
    spec = TokenSpec(VideoGrid(1, 6, 10))
    q, k, v = qkv(spec)
    state = MethodState()
    assert (table(tuple([9] * 13)).forward(q, k, v, AttentionCall(spec), state) == 0).all() and float(state.kept) == 0


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
    assert one.name == "plan" and not one.static and not one.stock and isinstance(one, AttentionMethod)
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
