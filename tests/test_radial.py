"""Radial Attention against the released mask and against an eager definition by tokens."""

import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_methods import qkv, reference

from fastdit.attention import MethodState, get_method
from fastdit.attention.methods import radial
from fastdit.attention.methods.radial import radial_blocks
from fastdit.token_orders import token_order
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

VECTORS = json.loads((Path(__file__).parent / "data" / "radial.json").read_text())["cases"]


@pytest.mark.parametrize("case", VECTORS, ids=lambda c: f"{c['frames']}x{c['height']}x{c['width']}-{c['decay']}")
def test_block_map_equals_the_released_mask(case):
    grid = VideoGrid(case["frames"], case["height"], case["width"])
    blocks = radial_blocks(grid, decay=case["decay"], block_size=case["block_size"], sink=case["sink"])
    counts = blocks.sum(1)
    assert int(counts.sum()) == case["kept"]
    assert (int(counts.min()), int(counts.max())) == (case["row_min"], case["row_max"])
    assert counts[: len(case["row_counts_first"])].tolist() == case["row_counts_first"]
    assert hashlib.sha256(np.packbits(blocks.numpy().ravel()).tobytes()).hexdigest() == case["sha256"]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("order", [None, "tile"])
def test_bands_do_not_depend_on_the_default_dtype(default, order):
    grid = VideoGrid(6, 30, 41)
    order = None if order is None else token_order(grid, order)
    how = {"decay": 0.8, "block_size": 64, "sink": True, "order": order}
    expected = radial_blocks(grid, **how)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(radial_blocks(grid, **how), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def eager_blocks(grid, decay, block, sink):
    """Token by token, from the note of the released rule: a Python loop over frame pairs and block parts."""
    s, power = grid.frame_tokens, 2 ** grid.frame_tokens.bit_length()
    count = math.ceil(grid.num_tokens / block)
    kept = np.zeros((count, count), bool)
    for i in range(grid.frames):
        for j in range(grid.frames):
            d = abs(i - j)
            octave = power / 2 ** d.bit_length()
            if d <= 1 or (sink and j == 0):
                tile = np.ones((s, s), bool)
            elif octave < 128 and d % int(128 // octave):
                continue
            else:
                k = np.arange(s)
                tile = abs(k[:, None] - k[None]) <= max(octave * decay, block)
            for a in range(i * s // block, ((i + 1) * s - 1) // block + 1):
                rows = tile[max(0, a * block - i * s) : (a + 1) * block - i * s]
                for b in range(j * s // block, ((j + 1) * s - 1) // block + 1):
                    columns = rows[:, max(0, b * block - j * s) : (b + 1) * block - j * s].mean(0)
                    if (columns > 0).any() and (columns > 1 / 3).sum() / (columns > 0).sum() > 0.6:
                        kept[a, b] = True
    return torch.from_numpy(kept)


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("decay", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(
    ("grid", "block"),
    [
        (VideoGrid(5, 8, 16), 32),
        (VideoGrid(7, 9, 11), 16),
        (VideoGrid(13, 5, 7), 16),
        (VideoGrid(40, 3, 3), 16),
        (VideoGrid(1, 9, 11), 32),
        (VideoGrid(3, 2, 2), 128),
    ],
    ids=str,
)
def test_any_grid_follows_the_rule(grid, block, decay, sink):
    blocks = radial_blocks(grid, decay=decay, block_size=block, sink=sink)
    assert torch.equal(blocks, eager_blocks(grid, decay, block, sink))


def eager_ordered_blocks(grid, decay, block, sink, order, min_band):
    """Token by token: which keys each query may see, then the share of each key column in a block that is seen."""
    s, power = grid.frame_tokens, 2 ** grid.frame_tokens.bit_length()
    seen = np.zeros((grid.num_tokens, grid.num_tokens), bool)
    for row, query in enumerate(order.tolist()):
        for column, key in enumerate(order.tolist()):
            d, across = abs(query // s - key // s), abs(query % s - key % s)
            octave = power / 2 ** d.bit_length()
            if d <= 1 or (sink and key < s):
                seen[row, column] = True
            elif octave >= min_band or d % int(min_band // octave) == 0:
                seen[row, column] = across <= max(octave * decay, block)
    count = math.ceil(grid.num_tokens / block)
    kept = np.zeros((count, count), bool)
    for a, b in itertools.product(range(count), repeat=2):
        columns = seen[a * block : (a + 1) * block, b * block : (b + 1) * block].mean(0)
        if (columns > 0).any():
            kept[a, b] = (columns > 1 / 3).sum() / (columns > 0).sum() > 0.6
    return torch.from_numpy(kept)


@pytest.mark.parametrize("order", ["tile", "curve", "token", "wfh"])
@pytest.mark.parametrize(
    ("grid", "block", "decay", "sink", "min_band"),
    [
        (VideoGrid(7, 9, 7), 16, 0.2, True, 128),
        (VideoGrid(13, 5, 7), 16, 0.5, False, 32),
        (VideoGrid(33, 3, 5), 16, 1.0, True, 8),
        (VideoGrid(1, 9, 11), 32, 0.5, False, 128),
        (VideoGrid(3, 2, 2), 128, 0.2, True, 128),
    ],
    ids=str,
)
def test_other_orders_follow_the_rule_over_tokens(grid, block, decay, sink, min_band, order, monkeypatch):
    tokens = token_order(grid, order, (2, 3, 4))
    settings = {"decay": decay, "block_size": block, "sink": sink, "min_band": min_band, "order": tokens}
    blocks = radial_blocks(grid, **settings)
    assert torch.equal(blocks, eager_ordered_blocks(grid, decay, block, sink, tokens, min_band))
    monkeypatch.setattr(radial, "COUNTS_AT_ONCE", 2 * grid.num_tokens)
    assert torch.equal(radial_blocks(grid, **settings), blocks), "two blocks of queries at a time"


@pytest.mark.parametrize("case", [c for c in VECTORS if c["height"] * c["width"] % c["block_size"] == 0][-2:])
def test_both_ways_agree_where_no_block_spans_two_frames(case):
    grid = VideoGrid(case["frames"], case["height"], case["width"])
    settings = {"decay": case["decay"], "block_size": case["block_size"], "sink": case["sink"]}
    blocks = radial_blocks(grid, order=torch.arange(grid.num_tokens), **settings)
    assert hashlib.sha256(np.packbits(blocks.numpy().ravel()).tobytes()).hexdigest() == case["sha256"]


@pytest.mark.parametrize("text", [(0, False), (19, True)], ids=str)
def test_the_order_is_that_of_the_layout(text):
    spec = TokenSpec(VideoGrid(9, 6, 7), *text)
    q = torch.zeros(1, 1, spec.num_tokens, 8)
    fields = {"decay": 0.1, "block_size": 16, "min_band": 64, "tile": (3, 2, 3)}
    maps = {}
    for order in ("raster", "fhw", "tile", "curve", "token"):
        method = get_method("radial", order=order, **fields)
        pattern = method.pattern(q, q, AttentionCall(spec), MethodState())
        tokens = token_order(spec.grid, order, (3, 2, 3))
        assert torch.equal(pattern.layout.index[0, : spec.grid.num_tokens] - spec.video.start, tokens)
        rule = {"decay": 0.1, "block_size": 16, "sink": True, "min_band": 64}
        expected = radial_blocks(spec.grid, order=None if order in ("raster", "fhw") else tokens, **rule)
        expected |= torch.eye(len(expected), dtype=torch.bool) & ~expected.any(-1, keepdim=True)
        maps[order] = pattern.mask.to_dense()[0, 0, : len(expected), : len(expected)]
        assert torch.equal(maps[order], expected)
    assert torch.equal(maps["raster"], maps["fhw"])
    assert not torch.equal(maps["tile"], maps["curve"])


@pytest.mark.parametrize(
    ("shape", "text", "order"),
    [
        ((21, 30, 52), 0, "raster"),
        ((21, 30, 52), 0, "curve"),
        ((21, 45, 80), 0, "raster"),
        ((21, 45, 80), 0, "tile"),
        ((13, 30, 45), 226, "raster"),
        ((13, 30, 45), 226, "tile"),
        ((13, 30, 45), 226, "curve"),
    ],
    ids=str,
)
def test_patterns_of_real_sizes(shape, text, order):
    spec = TokenSpec(VideoGrid(*shape), text, text_first=True)
    q = torch.zeros(1, 1, 1, 1).expand(1, 1, spec.num_tokens, 1)
    pattern = get_method("radial", order=order).pattern(q, q, AttentionCall(spec), MethodState())
    blocks, video = pattern.mask.to_dense()[0, 0], pattern.layout.video_blocks
    frame = (pattern.layout.index[0] - spec.video.start).clamp(min=0) // spec.grid.frame_tokens
    frame = frame[: spec.grid.num_tokens // 128 * 128].view(-1, 128)
    whole = len(frame)
    first, last = frame.amin(1), frame.amax(1)
    near = (last[:, None] - first <= 1) & (last - first[:, None] <= 1)
    assert near.any() or order == "curve", "runs of the curve are as deep as they are high and wide"
    assert blocks[:whole, :whole][near].all(), "frames next to each other see each other"
    assert blocks[:, :whole][:, last == 0].all() and blocks.diagonal().all()
    assert blocks[video:].all() and blocks[:, video:].all()
    assert int(pattern.mask.lengths_q.sum()) == spec.num_tokens
    assert 0.2 < pattern.density < 0.7


@pytest.mark.parametrize("shape", [(21, 30, 52), (21, 45, 80), (13, 30, 45), (41, 45, 80)], ids=str)
def test_real_grids_keep_neighbouring_frames_whole(shape):
    grid = VideoGrid(*shape)
    blocks = radial_blocks(grid, decay=0.2, block_size=128, sink=True)
    frame = torch.arange(grid.num_tokens) // grid.frame_tokens
    first = frame[::128]
    last = torch.cat([frame[127::128], frame[-1:]])[: len(first)]
    near = (first[:, None] - last[None] <= 1) & (first[None] - last[:, None] <= 1)
    assert blocks[near].all(), "a token and its frame, or a neighbouring one, were separated"
    assert blocks[:, first == 0].all()


@pytest.mark.parametrize("order", ["tile", "curve", "token"])
@pytest.mark.parametrize("text", [(0, False), (11, True), (11, False)], ids=str)
def test_attention_in_other_orders(order, text, poisoned_empty):
    call = AttentionCall(TokenSpec(VideoGrid(9, 9, 11), *text))
    q, k, v = qkv(call.tokens, batch=2)
    method = get_method("radial", block_size=16, order=order, decay=0.1)
    state = MethodState()
    out = method.forward(q, k, v, call, state)
    pattern = method.resolve(q, k, call, state)
    assert pattern.density < 0.9
    torch.testing.assert_close(out, reference(q, k, v, pattern), rtol=1e-4, atol=1e-5)
    everything = get_method("radial", block_size=16, order=order, decay=1e6, min_band=1)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(everything.forward(q, k, v, call, MethodState()), dense, rtol=1e-4, atol=1e-5)


def test_density_falls_and_work_grows_slowly_with_frames():
    """O(n log n): doubling the frames at most slightly more than doubles the blocks."""
    kept = [
        int(radial_blocks(VideoGrid(frames, 16, 16), decay=0.5, block_size=64, sink=True).sum())
        for frames in (32, 64, 128, 256)
    ]
    growth = [b / a for a, b in itertools.pairwise(kept)]
    assert max(growth) < 2.6, growth


def test_the_map_is_built_once_per_grid():
    spec, state, method = TokenSpec(VideoGrid(3, 8, 16)), MethodState(), get_method("radial")
    q = torch.zeros(1, 1, spec.num_tokens, 8)
    patterns = [method.resolve(q, q, AttentionCall(spec, layer=layer), state) for layer in range(3)]
    assert patterns[0] is patterns[1] is patterns[2]
    other = AttentionCall(TokenSpec(VideoGrid(3, 8, 8)))
    assert method.resolve(q, q, other, state) is not patterns[0]
    assert get_method("radial", decay=0.3).resolve(q, q, AttentionCall(spec), state) is not patterns[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"decay": 0},
        {"decay": -1},
        {"decay": "a"},
        {"decay": float("inf")},
        {"block_size": 100},
        {"block_size": 8},
        {"min_band": 0},
        {"min_band": True},
        {"order": "hilbert"},
        {"tile": (4, 4)},
    ],
)
def test_bad_fields(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        get_method("radial", **fields)
