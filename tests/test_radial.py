"""Radial Attention against the released mask and against an eager definition by tokens."""

import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdit.attention import MethodState, get_method
from fastdit.attention.radial import radial_blocks
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
    patterns = [state.resolve(method, q, q, AttentionCall(spec, layer=layer)) for layer in range(3)]
    assert patterns[0] is patterns[1] is patterns[2]
    other = AttentionCall(TokenSpec(VideoGrid(3, 8, 8)))
    assert state.resolve(method, q, q, other) is not patterns[0]
    assert state.resolve(get_method("radial", decay=0.3), q, q, AttentionCall(spec)) is not patterns[0]


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
    ],
)
def test_bad_fields(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        get_method("radial", **fields)
