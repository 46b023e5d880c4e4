"""Sparse-vDiT's patterns against eager definitions by tokens."""

import itertools

import pytest
import tiny
import torch

import fastdit
from fastdit.attention import MethodState, get_method
from fastdit.attention.kernels import block_sparse_attention
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

PATTERNS = ["diagonal", "multi_diagonal", "vertical_stripe"]
GRIDS = [(1, 6, 10), (3, 9, 11), (5, 8, 16), (2, 13, 5), (7, 3, 3)]


def places(name, grid):
    """The (frame, row, column) of each token, in the order that the paper computes the pattern in."""
    frames, height, width = (range(n) for n in grid)
    if name == "multi_diagonal":
        return [(f, h, w) for h, w, f in itertools.product(height, width, frames)]
    return list(itertools.product(frames, height, width))


def additions(name, blocks):
    """Block pairs (the lower one first) in the order in which a growing density adds them, after the own blocks."""
    golden = (5**0.5 - 1) / 2
    if name == "vertical_stripe":
        for column in sorted(range(blocks), key=lambda j: j * golden % 1):
            yield [(row, column) for row in range(blocks) if row != column]
    else:
        for distance in range(1, blocks):
            for first in sorted(range(blocks - distance), key=lambda i: i * golden % 1):
                yield [(first, first + distance), (first + distance, first)]


def eager(name, grid, block, density):
    """Which token may see which, ``(n, n)`` bool in raster order: pairs are added while that comes nearer."""
    order = places(name, grid)
    of = torch.arange(len(order)) // block
    tokens = of.bincount().tolist()
    kept = torch.eye(len(tokens), dtype=torch.bool)
    pairs = sum(size**2 for size in tokens)
    for added in additions(name, len(tokens)):
        more = pairs + sum(tokens[row] * tokens[column] for row, column in added)
        if abs(more / len(order) ** 2 - density) >= abs(pairs / len(order) ** 2 - density):
            break
        pairs = more
        kept[tuple(zip(*added, strict=True))] = True
    kept = kept[of][:, of]
    assert int(kept.sum()) == pairs
    raster = sorted(range(len(order)), key=order.__getitem__)
    return kept[raster][:, raster]


def in_raster_order(pattern, tokens):
    """The token mask of a pattern's video part, ``(n, n)`` bool, in raster order."""
    padded = pattern.layout.padded_tokens
    inverse = pattern.layout.inverse[0, tokens.video]
    return pattern.mask.to_tokens(padded, padded)[0, 0][inverse][:, inverse]


@pytest.mark.parametrize("text", [(0, False), (11, True), (11, False)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_blocks_follow_the_definition(name, grid, text):
    tokens = TokenSpec(VideoGrid(*grid), *text)
    for density in (0.02, 0.3, 0.7):
        pattern = fastdit.pattern(
            name, grid=grid, text_tokens=text[0], text_first=text[1], density=density, block_size=16
        )
        assert torch.equal(in_raster_order(pattern, tokens), eager(name, grid, 16, density))


@pytest.mark.parametrize("density", [0.05, 0.1, 1 / 3, 0.8, 1.0])
@pytest.mark.parametrize(
    ("grid", "block"), [((21, 30, 52), 128), ((13, 45, 80), 128), ((12, 24, 24), 64), ((11, 13, 17), 32)], ids=str
)
@pytest.mark.parametrize("name", PATTERNS)
def test_density_on_real_and_ragged_grids(name, grid, block, density):
    pattern = fastdit.pattern(name, grid=grid, density=density, block_size=block)
    blocks = pattern.layout.video_blocks
    # stripes come in whole columns; bands in pairs of blocks
    assert pattern.density == pytest.approx(
        density, abs=0.51 / blocks if name == "vertical_stripe" else 1.01 / blocks**2
    )
    assert pattern.mask.to_dense()[0, 0].diagonal().all()


@pytest.mark.parametrize("name", PATTERNS)
def test_a_higher_density_only_adds(name):
    maps = [
        fastdit.pattern(name, grid=(5, 9, 11), density=density, block_size=16).mask.to_dense()
        for density in (0.1, 0.15, 0.4, 0.41, 0.9)
    ]
    for less, more in itertools.pairwise(maps):
        assert (more | ~less).all()


def test_a_band_is_narrow_in_space_or_in_time():
    """Diagonal: near frames and whole rows of them. Multi-diagonal: all frames, near places."""
    grid = VideoGrid(8, 8, 16)
    frame = torch.arange(grid.num_tokens) // grid.frame_tokens
    place = torch.arange(grid.num_tokens) % grid.frame_tokens
    near, same = {}, {}
    for name in ("diagonal", "multi_diagonal"):
        kept = in_raster_order(fastdit.pattern(name, grid=grid.shape, density=0.25, block_size=16), TokenSpec(grid))
        near[name] = int((frame[:, None] - frame).abs()[kept].max())
        same[name] = bool(kept[place[:, None] == place].all())
    assert near == {"diagonal": 2, "multi_diagonal": 7}
    assert same == {"diagonal": False, "multi_diagonal": True}


def test_stripes_do_not_fall_into_step_with_frames():
    """With 9 blocks in a frame, every ninth column, or every third, would show the same rows of each frame."""
    for density, rows in ((1 / 9, 7), (1 / 3, 9)):
        blocks = fastdit.pattern("vertical_stripe", grid=(12, 24, 24), density=density).mask.to_dense()[0, 0]
        columns = blocks.all(0).nonzero().flatten()
        assert len(columns) == pytest.approx(108 * density, abs=2) and int(columns[0]) == 0
        assert len((columns % 9).unique()) >= rows
        assert int(columns.diff().max()) <= 2 / density


def test_skipped_heads_are_never_computed(poisoned_empty):
    q, k, v = (torch.full((2, 3, 40, 16), float("nan"), dtype=torch.bfloat16) for _ in range(3))
    call = AttentionCall(TokenSpec(VideoGrid(1, 5, 7), 5, True), key_padding=torch.zeros(2, 40, dtype=torch.bool))
    state = MethodState(kernel="no kernel is asked")
    out = get_method("skip").forward(q, k, v, call, state)
    assert out.shape == q.shape and out.dtype == q.dtype and (out == 0).all()
    assert state.kept is not None and float(state.kept) == 0 and not state.cache.entries


@pytest.mark.parametrize("text", [(0, False), (11, True), (150, False)], ids=str)
def test_the_pattern_of_skip_is_empty(text):
    pattern = fastdit.pattern("skip", grid=(3, 9, 11), text_tokens=text[0], text_first=text[1])
    assert pattern.density == 0 and not pattern.mask.to_dense().any()
    q = torch.randn(1, 2, pattern.layout.padded_tokens, 16)
    for kernel in ("cpu", "reference"):
        out, lse = block_sparse_attention(q, q, q, pattern.mask, kernel=kernel)
        assert (out == 0).all() and (lse == -torch.inf).all()


def test_a_skipped_model_reports_density_zero():
    pipe = tiny.pipeline("wan")
    handle = pipe.enable_sparse_attention("skip", schedule=fastdit.Schedule(dense_layers=(0,)))
    assert torch.isfinite(tiny.run(pipe)).all()
    dense, skipped = handle.report()["layers"]
    assert dense["sparse_calls"] == 0 and skipped["sparse_calls"] > 0
    assert handle.density == 0 and not skipped["fallbacks"]


def test_bad_fields():
    for name in PATTERNS:
        with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 25"):
            get_method(name, density=25)
        with pytest.raises(ValueError, match="block_size must be a power of two"):
            get_method(name, block_size=100)
    with pytest.raises(TypeError, match="has no field 'density'; it has none"):
        get_method("skip", density=0.5)
