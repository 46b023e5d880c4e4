import itertools

import pytest
import torch

from fastdit.layout import TokenLayout, axis_order, tile_order
from fastdit.tokens import TokenSpec, VideoGrid

GRIDS = [VideoGrid(1, 1, 1), VideoGrid(1, 5, 7), VideoGrid(3, 4, 6), VideoGrid(5, 9, 11), VideoGrid(4, 8, 8)]
TEXTS = [(0, False), (7, True), (7, False), (64, True), (64, False)]


def orders(grid):
    yield None, None
    yield axis_order(grid, "hwf"), None
    yield torch.stack([torch.randperm(grid.num_tokens) for _ in range(3)]), None
    yield tile_order(grid, (2, 3, 4))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("text", TEXTS, ids=str)
@pytest.mark.parametrize("block", [16, 64])
def test_round_trip_is_exact(grid, text, block):
    spec = TokenSpec(grid, *text)
    x = torch.randn(2, 3, spec.num_tokens, 4)
    for order, segments in orders(grid):
        layout = TokenLayout.build(spec, block=block, order=order, segments=segments)
        laid_out = layout.apply(x)
        assert laid_out.shape == (2, 3, layout.padded_tokens, 4)
        assert torch.equal(layout.undo(laid_out), x)
        assert int(layout.lengths().sum()) == spec.num_tokens * layout.index.shape[0]
        padding = (layout.index < 0)[None, :, :, None].expand(2, -1, -1, 4)
        assert (laid_out[padding.expand_as(laid_out)] == 0).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_parts_start_on_block_borders_and_padding_ends_blocks(grid, text):
    spec = TokenSpec(grid, *text)
    for order, segments in orders(grid):
        layout = TokenLayout.build(spec, block=16, order=order, segments=segments)
        tokens = torch.arange(spec.num_tokens)
        is_text = (tokens >= spec.text.start) & (tokens < spec.text.stop)
        for row in layout.index:
            for number, block in enumerate(row.split(16)):
                real = block[block >= 0]
                assert (block[: len(real)] >= 0).all(), "padding comes last in a block"
                assert (is_text[real] == (number >= layout.video_blocks)).all(), "text has its own blocks"


def test_identity_copies_nothing():
    layout = TokenLayout.build(TokenSpec(VideoGrid(2, 4, 8), 9), block=16)
    x = torch.randn(1, 2, 73, 4)
    assert layout.identity and layout.apply(x) is x and layout.undo(x) is x
    assert not TokenLayout.build(TokenSpec(VideoGrid(2, 4, 8), 9, text_first=True), block=16).identity
    assert not TokenLayout.build(TokenSpec(VideoGrid(2, 4, 7), 9), block=16).identity
    assert TokenLayout.build(TokenSpec(VideoGrid(2, 4, 7)), block=16).identity


def test_video_comes_before_text_that_the_model_puts_first():
    spec = TokenSpec(VideoGrid(1, 2, 3), 2, text_first=True)
    layout = TokenLayout.build(spec, block=16)
    assert layout.index[0, :6].tolist() == [2, 3, 4, 5, 6, 7]
    assert layout.index[0, 16:].tolist() == [0, 1]


def test_lengths_without_padding():
    spec = TokenSpec(VideoGrid(1, 2, 8), 20)
    layout = TokenLayout.build(spec, block=16)
    padding = torch.zeros(2, 36, dtype=torch.bool)
    padding[0, 16 + 3 :] = True
    padding[1, 16 + 18 :] = True
    assert layout.lengths_without(padding).tolist() == [[[16, 3, 0]], [[16, 16, 2]]]


@pytest.mark.parametrize("axes", ["".join(p) for p in itertools.permutations("fhw")])
def test_axis_orders(axes):
    grid = VideoGrid(2, 3, 5)
    order = axis_order(grid, axes)
    coordinates = {"f": order // 15, "h": order % 15 // 5, "w": order % 5}
    slow, middle, fast = (coordinates[a] for a in axes)
    assert (torch.stack([slow, middle, fast], 1).tolist()) == sorted(torch.stack([slow, middle, fast], 1).tolist())


def test_tile_order_keeps_tiles_together():
    grid = VideoGrid(3, 5, 7)
    order, sizes = tile_order(grid, (2, 2, 4))
    assert sizes.tolist() == [16, 12, 16, 12, 8, 6, 8, 6, 8, 6, 4, 3]
    coordinates = torch.stack([order // 35 // 2, order % 35 // 7 // 2, order % 7 // 4], 1)
    for tile in coordinates.split(sizes.tolist()):
        assert (tile == tile[0]).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"block": 0}, "block must be at least 1"),
        ({"block": 16, "order": torch.zeros(6, dtype=torch.int64)}, "exactly once"),
        ({"block": 16, "segments": torch.tensor([4, 1])}, "add up to 6"),
        ({"block": 16, "segments": torch.tensor([6, 0])}, "add up to 6"),
    ],
)
def test_bad_layouts(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TokenLayout.build(TokenSpec(VideoGrid(1, 2, 3)), **kwargs)


def test_bad_orders_and_lengths():
    with pytest.raises(ValueError, match="permutation of 'fhw'"):
        axis_order(VideoGrid(1, 2, 3), "fhh")
    with pytest.raises(ValueError, match="every axis"):
        tile_order(VideoGrid(1, 2, 3), (0, 1, 1))
    with pytest.raises(ValueError, match="do not fit"):
        TokenLayout.build(TokenSpec(VideoGrid(1, 2, 3)), block=16).lengths(12)
