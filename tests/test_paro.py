"""PAROAttention, calibration and method, against an eager definition written from the paper."""

import itertools
import json
import math

import pytest
import test_methods
import tiny
import torch
from test_paro_plan import plan_for

import fastdit
from fastdit.attention import MethodState, get_method, mass
from fastdit.attention.methods.paro import calibrate
from fastdit.attention.methods.paro.calibration import keep_largest, order_scores, order_statistics
from fastdit.attention.methods.paro.masks import AXIS_ORDERS
from fastdit.layout import TokenLayout, stack_heads
from fastdit.token_orders import axis_order
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

GRIDS = [VideoGrid(1, 6, 10), VideoGrid(3, 5, 7), VideoGrid(2, 4, 8)]
TEXTS = [(0, False), (19, True), (19, False)]


def replay(samples):
    """A run that shows samples."""

    def run(look):
        for sample in samples:
            look(*sample)

    return run


def along(grid, axis, dim=16, sharpness=80.0):
    """Queries and keys of one head that attend to tokens with the same place on all other axes, ``(n, D)``."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid.shape), indexing="ij"), -1).flatten(0, 2)
    others = [a for a in range(3) if a != axis]
    number = places[:, others[0]] * grid.shape[others[1]] + places[:, others[1]]
    codes = torch.nn.functional.normalize(torch.randn(int(number.max()) + 1, dim), dim=-1)
    return codes[number] * sharpness, codes[number]


def eager_map(q, k, call, axes, block):
    """The post-softmax map of one head, (n, n) over the video in an axis order, and its blocks."""
    scores = q.double() @ k.double().T * (q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if call.key_padding is not None:
        scores = scores.masked_fill(call.key_padding[0], -torch.inf)
    order = axis_order(call.tokens.grid, axes) + call.tokens.video.start
    attention = scores.softmax(-1)[order][:, order]
    return [list(rows.split(block, 1)) for rows in attention.split(block)]


@pytest.mark.parametrize("chunk", [1, 1 << 25], ids=["one row at a time", "whole heads"])
@pytest.mark.parametrize(("grid", "text"), list(itertools.product(GRIDS, TEXTS)), ids=str)
def test_statistics_are_those_of_the_whole_map(grid, text, chunk, monkeypatch):
    monkeypatch.setattr(mass, "MAX_ENTRIES", chunk)
    spec = TokenSpec(grid, *text)
    q, k, _ = (x * 3 for x in test_methods.qkv(spec, heads=2))
    padding = torch.zeros(1, spec.num_tokens, dtype=torch.bool)
    padding[0, spec.text.start + 5 : spec.text.stop] = True
    call = AttentionCall(spec, scale=0.2, key_padding=padding if spec.text_tokens else None)
    for axes in AXIS_ORDERS:
        layout = TokenLayout.build(spec, block=16, order=axis_order(grid, axes))
        sparse, uneven = order_statistics(q, k, call, layout, small=1e-3, small_share=0.5)
        for head in range(2):
            blocks = [part for row in eager_map(q[0, head], k[0, head], call, axes, 16) for part in row]
            quiet = sum(float((part < 1e-3).double().mean()) >= 0.5 for part in blocks)
            assert float(sparse[head]) == pytest.approx(quiet / len(blocks))
            peak = sum(float(part.max() / part.mean()) for part in blocks) / len(blocks)
            assert float(uneven[head]) == pytest.approx(peak, rel=1e-4)


def test_an_empty_block_is_sparse_and_even():
    spec = TokenSpec(VideoGrid(2, 4, 4))
    q, k = torch.zeros(2, 1, 1, 32, 4).unbind()
    q[..., :16, 0], q[..., 16:, 0], k[..., :16, 0], k[..., 16:, 0] = 1, -1, 400, -400
    sparse, uneven = order_statistics(
        q, k, AttentionCall(spec), TokenLayout.build(spec, block=16), small=1e-3, small_share=0.9
    )
    assert sparse.tolist() == [0.5] and uneven.tolist() == [pytest.approx(1)]


def test_the_least_score_has_the_most_sparse_and_the_most_even_blocks():
    sparse, uneven = torch.tensor([[0.9], [0.2], [0.9]]), torch.tensor([[4.0], [4.0], [8.0]])
    scores = order_scores(sparse, uneven, 0.5)[:, 0].tolist()
    assert scores == pytest.approx([0.5 * 0.1 + 0.5 * 0.25, 0.5 * 0.8 + 0.5 * 0.25, 0.5 * 0.1 + 0.5 * 0.5])
    assert min(scores) == scores[0]
    assert order_scores(torch.ones(6, 2), torch.ones(6, 2), 0.5).isfinite().all()


def test_blocks_with_the_largest_sums_are_kept_until_the_budget_is_met():
    sums = torch.tensor([[[0.1, 5.0, 1.0], [2.0, 0.1, 5.0], [0.0, 0.0, 0.1]]])
    pairs = torch.tensor([[16, 16, 4], [16, 16, 4], [4, 4, 1]])
    own = 16 + 16 + 1
    for budget, expected in [
        (0, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        (own, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        (own + 1, [[1, 1, 0], [0, 1, 0], [0, 0, 1]]),
        (own + 16, [[1, 1, 0], [0, 1, 0], [0, 0, 1]]),
        (own + 17, [[1, 1, 0], [0, 1, 1], [0, 0, 1]]),
        (own + 21, [[1, 1, 0], [1, 1, 1], [0, 0, 1]]),
        (own + 41, [[1, 1, 1], [1, 1, 1], [1, 0, 1]]),
        (81, [[1, 1, 1], [1, 1, 1], [1, 1, 1]]),
    ]:
        assert keep_largest(sums, pairs, budget)[0].int().tolist() == expected, budget


@pytest.mark.parametrize(("grid", "text"), list(itertools.product(GRIDS, TEXTS)), ids=str)
def test_plan_of_a_brute_force_calibration(grid, text):
    """Orders by the least score over all samples, batch included; blocks by their sums over those of their bucket."""
    spec = TokenSpec(grid, *text)
    samples = []
    for layer, step in itertools.product(range(2), (0, 3, 4)):
        q, k, _ = test_methods.qkv(spec, batch=2, heads=2)
        samples.append((q * 3, k, AttentionCall(spec, layer=layer, num_layers=2, step=step, num_steps=6)))
    plan = calibrate(replay(samples), density=0.4, block_size=16, edges=(0.5, 1))
    rows = math.ceil(grid.num_tokens / 16)
    sizes = torch.full((rows,), 16)
    sizes[-1] = grid.num_tokens - 16 * (rows - 1)
    for layer, head in itertools.product(range(2), range(2)):
        mine = [(q[b, head], k[b, head], c) for q, k, c in samples if c.layer == layer for b in range(2)]
        statistics = []
        for axes in AXIS_ORDERS:
            maps = [eager_map(q, k, call, axes, 16) for q, k, call in mine]
            blocks = [part for blocks in maps for row in blocks for part in row]
            sparse = sum(float((part < 1e-3).double().mean()) >= 0.9 for part in blocks) / len(blocks)
            uneven = sum(float(part.max() / part.mean()) for part in blocks) / len(blocks)
            statistics.append((1 - sparse, uneven))
        dense, peaks = (sum(column) for column in zip(*statistics, strict=True))
        scores = [0.5 * a / (dense or 1) + 0.5 * b / peaks for a, b in statistics]
        least = next(i for i, score in enumerate(scores) if score <= min(scores) * (1 + 1e-5))
        assert plan.orders[layer][head] == AXIS_ORDERS[least]
        for bucket in range(2):
            maps = [eager_map(q, k, c, AXIS_ORDERS[least], 16) for q, k, c in mine if (c.step >= 3) == bucket]
            sums = {(i, j): sum(float(m[i][j].sum()) for m in maps) for i in range(rows) for j in range(rows)}
            kept = {(i, i) for i in range(rows)}
            text_pairs = spec.num_tokens**2 - grid.num_tokens**2
            for i, j in sorted(set(sums) - kept, key=lambda place: (-sums[place], place)):
                if sum(int(sizes[a] * sizes[b]) for a, b in kept) + text_pairs >= 0.4 * spec.num_tokens**2:
                    break
                kept.add((i, j))
            assert {tuple(place) for place in plan.blocks(bucket, layer)[head].nonzero().tolist()} == kept


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["frames", "height", "width"])
def test_a_head_gets_the_order_in_which_it_is_compact(axis):
    """A head that attends along one axis gets an order with that axis innermost, and keeps its mass at low density."""
    grid = VideoGrid(8, 8, 8)
    spec = TokenSpec(grid)
    q, k = (x[None, None] for x in along(grid, axis))
    plan = calibrate(replay([(q, k, AttentionCall(spec))]), density=0.15, block_size=16)
    assert plan.orders[0][0][-1] == "fhw"[axis]
    pattern = get_method("paro", plan=plan).pattern(q, k, AttentionCall(spec), MethodState())
    weights = (q[0, 0] @ k[0, 0].T / 4).softmax(-1)
    tokens = pattern.mask.to_tokens(512, 512)[0, 0]
    inverse = pattern.layout.inverse[0]
    assert float((weights * tokens[inverse][:, inverse]).sum()) / 512 > 0.99
    assert pattern.density == pytest.approx(0.15, abs=0.01)


def test_of_equal_orders_the_first_is_taken():
    """With one frame, or if blocks hold the same tokens in another order, orders do not differ but for rounding."""
    for grid, first in [((1, 6, 10), {"fhw", "fwh"}), ((2, 4, 8), {"fhw", "fwh", "hwf", "whf"})]:
        spec = TokenSpec(VideoGrid(*grid))
        q, k, _ = test_methods.qkv(spec, heads=16)
        samples = [(q * 3, k, AttentionCall(spec))]
        plan = calibrate(replay(samples), block_size=16)
        assert len(set(plan.orders[0])) > 1 and set(plan.orders[0]) <= first
        assert calibrate(replay(samples), block_size=16) == plan


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_density_counts_real_pairs_and_text(text, density):
    spec = TokenSpec(VideoGrid(5, 9, 11), *text)
    q, k, _ = test_methods.qkv(spec, heads=2)
    call = AttentionCall(spec)
    plan = calibrate(replay([(q, k, call)]), density=density, block_size=16)
    found = get_method("paro", plan=plan).pattern(q, k, call, MethodState())
    assert density <= found.density + 1e-6 and found.density == pytest.approx(density, abs=0.01)


@pytest.mark.parametrize("text", TEXTS, ids=str)
@pytest.mark.parametrize("grid", [*GRIDS, VideoGrid(4, 1, 5)], ids=str)
def test_every_order_comes_back_exactly(grid, text):
    """All six orders in one layer: heads laid out by stacking are laid out as by building them, and undone."""
    spec = TokenSpec(grid, *text)
    orders = torch.stack([axis_order(grid, axes) for axes in AXIS_ORDERS])
    layouts = [TokenLayout.build(spec, block=16, order=order) for order in orders]
    stacked, built = stack_heads(layouts), TokenLayout.build(spec, block=16, order=orders)
    assert torch.equal(stacked.index, built.index) and torch.equal(stacked.inverse, built.inverse)
    assert (stacked.block, stacked.video_blocks) == (built.block, built.video_blocks)
    x = torch.randn(2, 6, spec.num_tokens, 3)
    assert torch.equal(stacked.undo(stacked.apply(x)), x)
    assert torch.equal(stacked.block_lengths, built.block_lengths) and torch.equal(stacked.padding, built.padding)
    assert (stacked.num_tokens, stacked.padded_tokens) == (built.num_tokens, built.padded_tokens)
    kept = [value for value in vars(stacked).values() if isinstance(value, torch.Tensor)]
    assert all(value.numel() < built.index.numel() for value in kept), "the rows of all heads stay in memory"
    one = stack_heads(layouts[:1] * 6)
    assert one is layouts[0]


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_what_runs_is_the_plan(text, poisoned_empty):
    """Each layer its orders and each bucket its blocks, whatever the schedule says about rebuilding."""
    spec = TokenSpec(VideoGrid(3, 5, 7), *text)
    plan = plan_for(spec, layers=2, edges=(1 / 3, 2 / 3, 1))
    method, states = get_method("paro", plan=plan), [MethodState(), MethodState()]
    for step, layer in itertools.product(range(6), range(2)):
        call = AttentionCall(spec, layer=layer, num_layers=2, step=step, num_steps=6)
        q, k, v = test_methods.qkv(spec, batch=2)
        state = states[layer]
        state.refresh = step % 3 == 0
        before = state.pattern
        out = method.forward(q, k, v, call, state)
        pattern = method.pattern(q, k, call, MethodState())
        video = pattern.layout.video_blocks
        assert torch.equal(pattern.mask.to_dense()[0, :, :video, :video], plan.blocks(step // 2, layer))
        orders = torch.stack([axis_order(spec.grid, axes) for axes in plan.orders[layer]])
        assert torch.equal(pattern.layout.index[:, : spec.grid.num_tokens] - spec.video.start, orders)
        torch.testing.assert_close(out, test_methods.reference(q, k, v, pattern), rtol=1e-4, atol=1e-5)
        assert float(state.kept) == pytest.approx(pattern.density)
        kept = before is not None and state.pattern.mask is before.mask
        assert kept == (step not in (0, 2, 4))
        other = MethodState(cache=state.cache)
        assert method.pattern(q, k, call, other).mask is state.pattern.mask, "guidance passes share blocks"


def test_a_pattern_of_another_bucket_is_not_reused():
    spec = TokenSpec(VideoGrid(3, 5, 7))
    method, state = get_method("paro", plan=plan_for(spec, edges=(0.5, 1))), MethodState()
    q, k, v = test_methods.qkv(spec)
    method.resolve(q, k, AttentionCall(spec, step=0, num_steps=2), state)
    state.refresh = False
    late = AttentionCall(spec, step=1, num_steps=2)
    assert torch.equal(method.forward(q, k, v, late, state), method.forward(q, k, v, late, MethodState()))


def test_some_heads_of_a_layer():
    spec = TokenSpec(VideoGrid(3, 5, 7), 4)
    q, k, v = test_methods.qkv(spec, heads=5)
    method = get_method("paro", plan=plan_for(spec, heads=5))
    whole = method.forward(q, k, v, AttentionCall(spec), MethodState())
    heads = (1, 4)
    part = method.forward(*(x[:, heads] for x in (q, k, v)), AttentionCall(spec, heads=heads), MethodState())
    torch.testing.assert_close(part, whole[:, heads])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": TokenSpec(VideoGrid(5, 3, 7), 4)}, "for a video of 3x5x7 tokens, got a video of 5x3x7 tokens"),
        ({"tokens": TokenSpec(VideoGrid(3, 5, 7))}, "for 4 text tokens, got 0 text tokens"),
        ({"tokens": TokenSpec(VideoGrid(3, 5, 7), 4, True)}, "for text that comes last, got text that comes first"),
        ({"num_layers": 3}, "for 2 layers, got 3 layers"),
        ({"heads": (0, 1, 7)}, "for 3 heads, got 8 heads"),
    ],
)
def test_a_plan_for_something_else(change, message):
    spec = TokenSpec(VideoGrid(3, 5, 7), 4)
    method = get_method("paro", plan=plan_for(spec, layers=2))
    call = AttentionCall(**{"tokens": spec, "num_layers": 2, **change})
    q, k, v = test_methods.qkv(call.tokens)
    with pytest.raises(ValueError, match=f"the plan of method 'paro' is {message}; calibrate one for this model"):
        method.forward(q, k, v, call, MethodState())


def test_heads_of_another_model():
    spec = TokenSpec(VideoGrid(3, 5, 7))
    q, k, v = test_methods.qkv(spec, heads=2)
    with pytest.raises(ValueError, match="is for 3 heads, got 2 heads"):
        get_method("paro", plan=plan_for(spec)).forward(q, k, v, AttentionCall(spec), MethodState())


def test_several_buckets_need_the_number_of_steps():
    spec = TokenSpec(VideoGrid(3, 5, 7))
    q, k, v = test_methods.qkv(spec)
    with pytest.raises(ValueError, match="which of 2 step buckets a call is in"):
        get_method("paro", plan=plan_for(spec, edges=(0.5, 1))).forward(q, k, v, AttentionCall(spec), MethodState())


def test_no_plan_says_how_to_make_one():
    q, k, v = test_methods.qkv(TokenSpec(VideoGrid(1, 2, 3)))
    with pytest.raises(ValueError, match=r"has no plan; make one with fastdit\.attention\.methods\.paro\.calibrate\("):
        fastdit.sparse_attention_call(q, k, v, grid=(1, 2, 3), method="paro")
    with pytest.raises(TypeError, match="plan must be a ParoPlan or the path of one, got int"):
        get_method("paro", plan=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0}, "density must be in"),
        ({"block_size": 48}, "block_size must be"),
        ({"edges": (0.5,)}, "edges of step buckets must be"),
        ({"small": 0}, "small must be above 0"),
        ({"small": float("nan")}, "small must be above 0"),
        ({"small_share": 1.5}, r"small_share in \(0, 1\]"),
        ({"balance": -1}, r"balance in \[0, 1\]"),
        ({"edges": (0.5, 1)}, r"no sample of layer 0 of 2 in step bucket 1 of 2 \(2 are missing in all\)"),
    ],
)
def test_calibrations_that_cannot_be(fields, message):
    spec = TokenSpec(VideoGrid(1, 4, 4))
    q, k, _ = test_methods.qkv(spec)
    samples = [(q, k, AttentionCall(spec, layer=layer, num_layers=2, num_steps=4)) for layer in range(2)]
    with pytest.raises(ValueError, match=message):
        calibrate(replay(samples), **fields)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_makes_no_plan(value):
    call = AttentionCall(TokenSpec(VideoGrid(1, 4, 4), 3))
    q, k, _ = test_methods.qkv(call.tokens)
    k[0, 1, 5] = value
    with pytest.raises(ValueError, match="queries or keys of the samples are NaN or Inf"):
        calibrate(replay([(q, k, call)]), block_size=16)


def test_samples_that_do_not_fit():
    spec = TokenSpec(VideoGrid(1, 4, 4))
    q, k, _ = test_methods.qkv(spec)
    call = AttentionCall(spec)
    with pytest.raises(ValueError, match="there are no samples"):
        calibrate(replay([]))
    with pytest.raises(ValueError, match=r"must be \(B, H, 16, D\), .* got \(1, 3, 16, 16\) and \(1, 3, 9, 16\)"):
        calibrate(replay([(q, k[:, :, :9], call)]))
    with pytest.raises(ValueError, match="samples must agree in tokens, layers and heads"):
        calibrate(replay([(q, k, call), (q[:, :2], k[:, :2], call)]))


def test_in_a_pipeline():
    """Calibrated on what a dense run computes, run for both branches; another size is an error and not a dense call."""
    pipe = tiny.pipeline("wan", layers=2)
    samples = []

    class Capture(tiny.Recorder):
        def forward(self, q, k, v, call, state):
            samples.append((q, k, call))
            return super().forward(q, k, v, call, state)

    pipe.enable_sparse_attention(Capture(), schedule=tiny.EVERY_STEP)
    dense = tiny.run(pipe, steps=4)
    plan = calibrate(replay(samples), density=0.4, block_size=16, edges=(0.25, 0.5, 1))
    handle = pipe.enable_sparse_attention("paro", plan=plan, schedule=fastdit.Schedule(refresh_steps=100))
    assert json.loads(json.dumps(handle.report()))["method"]["plan"] == repr(plan)
    sparse = tiny.run(pipe, steps=4)
    assert handle.density == pytest.approx(0.4, abs=0.05) and handle.report()["totals"]["sparse_calls"] == 16
    assert 0 < float((sparse - dense).norm() / dense.norm()) < 0.1
    with pytest.raises(ValueError, match="is for a video of"):
        tiny.run(pipe, steps=1, size=(9, 96, 128))
    pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(pipe, steps=4), dense)
