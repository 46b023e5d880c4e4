import itertools
import time
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit.attention import MethodState
from fastdit.attention.ordered import OrderedMethod
from fastdit.attention.pattern import pattern_of
from fastdit.layout import TokenLayout
from fastdit.token_orders import ORDERS, axis_order, tile_order, tile_parts, token_order
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

GRIDS = [VideoGrid(1, 1, 1), VideoGrid(1, 5, 7), VideoGrid(3, 4, 6), VideoGrid(5, 9, 11), VideoGrid(4, 8, 8)]
TEXTS = [(0, False), (7, True), (7, False), (64, True), (64, False)]


@dataclass(frozen=True, kw_only=True)
class Ordered(OrderedMethod):
    def pattern(self, q, k, call, state):
        raise NotImplementedError


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


class Writes(TorchDispatchMode):
    """Note the operations that write something."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(argument.alias_info is None or argument.alias_info.is_write for argument in func._schema.returns):
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("text", "padded"), [(0, False), (7, True)])
def test_tokens_are_copied_once(heads, text, padded):
    """One gather; padding is filled in where it is, without a pass over everything."""
    spec = TokenSpec(VideoGrid(2, 3, 7), text)
    layout = TokenLayout.build(spec, block=16, order=torch.stack([torch.randperm(42) for _ in range(heads)]))
    x = torch.randn(2, 3, spec.num_tokens, 4)
    laid_out = layout.apply(x)
    gather = "index_select" if heads == 1 else "gather"
    with Writes() as writes:
        layout.apply(x)
        assert writes.seen == ([gather, "index_fill_"] if padded else [gather])
        layout.undo(laid_out)
        assert writes.seen[-1] == gather and len(writes.seen) == 2 + padded


@pytest.mark.parametrize("heads", [1, 3])
def test_gradients_pass_through(heads):
    spec = TokenSpec(VideoGrid(2, 3, 7), 7, text_first=True)
    layout = TokenLayout.build(spec, block=16, order=torch.stack([torch.randperm(42) for _ in range(heads)]))
    x = torch.randn(2, 3, 49, 4, requires_grad=True)
    weight = torch.randn(2, 3, layout.padded_tokens, 4)
    (layout.apply(x) * weight).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, layout.undo(weight))


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


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tile", [(1, 2, 4), (2, 2, 4), (4, 3, 2), (3, 2, 2)], ids=str)
def test_tile_order_keeps_tiles_together(grid, tile):
    order, sizes = tile_order(grid, tile)
    expected = []
    for part, box in tile_parts(grid, tile):
        first = 0 if part.frames == grid.frames else (part.frames > 1 or box[0] > 1)
        for corner in itertools.product(*(range(0, n, t) for n, t in zip(part.shape, box, strict=True))):
            ranges = [range(c, min(c + t, n)) for c, t, n in zip(corner, box, part.shape, strict=True)]
            expected.append(
                [((f + first) * grid.height + h) * grid.width + w for f, h, w in itertools.product(*ranges)]
            )
    assert [tile.tolist() for tile in order.split(sizes.tolist())] == expected


def test_the_first_frame_has_tiles_of_its_own():
    """Tiles of several frames divide the frames after the first one, as causal video autoencoders make them."""
    assert tile_parts(VideoGrid(5, 16, 16), (4, 4, 4)) == [
        (VideoGrid(1, 16, 16), (1, 8, 8)),
        (VideoGrid(4, 16, 16), (4, 4, 4)),
    ]
    assert tile_order(VideoGrid(5, 16, 16), (4, 4, 4))[1].tolist() == [64] * 20
    assert [box for _, box in tile_parts(VideoGrid(3, 8, 8), (2, 3, 5))] == [(1, 3, 10), (2, 3, 5)]
    assert tile_parts(VideoGrid(1, 8, 8), (4, 2, 2)) == [(VideoGrid(1, 8, 8), (1, 4, 4))]
    assert tile_parts(VideoGrid(5, 8, 8), (1, 4, 4)) == [(VideoGrid(5, 8, 8), (1, 4, 4))]


@pytest.mark.parametrize("huge", [10**15, 10**20, 2**61 - 1])
def test_tiles_larger_than_the_video(huge):
    """They cost nothing, and are those of the video's own size."""
    grid, start = VideoGrid(3, 4, 5), time.monotonic()
    for tile in itertools.product((1, huge), (1, huge), (1, huge)):
        fitting = tuple(min(n, size) for n, size in zip(tile, (60, 4, 5), strict=True))
        for found, expected in zip(tile_order(grid, tile), tile_order(grid, fitting), strict=True):
            assert torch.equal(found, expected)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("block", [16, 60], ids=["padded", "as it is"])
def test_other_lengths_are_refused(block):
    segments = torch.tensor([30, 30] if block == 16 else [60])
    layout = TokenLayout.build(TokenSpec(VideoGrid(3, 4, 5)), block=block, segments=segments)
    assert layout.identity == (block == 60)
    for shape in ((1, 2, 59, 4), (1, 2, 77, 4), (2, 60, 4)):
        with pytest.raises(ValueError, match=r"takes \(B, H, 60, D\), got "):
            layout.apply(torch.zeros(shape))
        with pytest.raises(ValueError, match=rf"takes \(B, H, {layout.padded_tokens}, D\), got "):
            layout.undo(torch.zeros(shape))


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


@pytest.mark.parametrize("order", ORDERS)
def test_every_named_order_lists_every_token_once(order):
    drawn = [VideoGrid(*sizes) for sizes in torch.randint(1, 18, (20, 3)).tolist()]
    for grid in [*GRIDS, *drawn, VideoGrid(17, 1, 1), VideoGrid(1, 1, 19), VideoGrid(1, 23, 1)]:
        for tile in [(4, 4, 4), (2, 3, 5), (1, 1, 1), (99, 99, 99)] if order == "tile" else [(4, 4, 4)]:
            tokens = token_order(grid, order, tile)
            assert tokens.dtype == torch.int64
            assert torch.equal(tokens.sort().values, torch.arange(grid.num_tokens)), (grid, tile)


def test_names_of_orders():
    grid = VideoGrid(2, 3, 4)
    assert torch.equal(token_order(grid, "raster"), torch.arange(24))
    assert token_order(grid, "token")[:4].tolist() == [0, 12, 1, 13]
    assert torch.equal(token_order(grid, "wfh"), axis_order(grid, "wfh"))
    assert token_order(grid, "tile", (2, 2, 2))[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert token_order(VideoGrid(3, 3, 4), "tile", (2, 2, 2))[12:20].tolist() == [12, 13, 16, 17, 24, 25, 28, 29]
    with pytest.raises(ValueError, match="unknown order 'hilbert'; orders are: tile, curve, raster, token, fhw"):
        token_order(grid, "hilbert")


def steps(grid, order):
    return torch.stack(torch.unravel_index(order, grid.shape), 1).diff(dim=0).abs().sum(1)


def test_the_curve_never_jumps():
    """A path through all cells exists in every box, so not even parity excuses a jump."""
    for sizes in itertools.product([1, 2, 3, 4, 5, 7, 8], repeat=3):
        grid = VideoGrid(*sizes)
        assert (steps(grid, token_order(grid, "curve")) == 1).all(), grid


@pytest.mark.parametrize("shape", [(21, 45, 80), (21, 30, 52), (13, 30, 45), (41, 45, 81)], ids=str)
def test_runs_of_the_curve_are_compact(shape):
    """64 tokens in a row are spread about as little as in a cube of 4 x 4 x 4, whose mean squared distance is 3.75."""
    grid = VideoGrid(*shape)
    order = token_order(grid, "curve")
    assert (steps(grid, order) == 1).all()
    runs = torch.stack(torch.unravel_index(order, grid.shape), 1).double()[: len(order) // 64 * 64].view(-1, 64, 3)
    assert (runs - runs.mean(1, keepdim=True)).square().sum(-1).mean() < 1.5 * 3.75


@pytest.mark.parametrize("order", ["raster", "tile", "curve", "token", "wfh"])
@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_ordered_methods_cut_the_order_into_blocks(order, text):
    spec, state = TokenSpec(VideoGrid(3, 5, 7), *text), MethodState()
    method = Ordered(block_size=16, order=order, tile=(2, 2, 3))
    layout = method.layout(AttentionCall(spec), torch.device("cpu"), state)
    video = layout.index[0, :105] - spec.video.start
    assert torch.equal(video, token_order(spec.grid, order, (2, 2, 3)))
    assert layout.video_blocks == 7 and layout.block == 16
    assert method.layout(AttentionCall(spec, layer=3), torch.device("cpu"), state) is layout
    for fields in ({"block_size": 32}, {"order": "hfw"}, {"tile": (3, 2, 2)}):
        other = Ordered(**{"block_size": 16, "order": order, "tile": (2, 2, 3)} | fields)
        again = other.layout(AttentionCall(spec), torch.device("cpu"), state)
        tokens = token_order(spec.grid, other.order, other.tile)
        assert again.block == other.block_size and torch.equal(again.index[0, :105] - spec.video.start, tokens)
    assert method.layout(AttentionCall(spec), torch.device("meta"), state).index.is_meta


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_patterns_of_chosen_blocks(text):
    layout = TokenLayout.build(TokenSpec(VideoGrid(3, 5, 7), *text), block=16)
    chosen = torch.rand(2, 3, 7, 7) < 0.4
    chosen[..., 0] = True
    for max_count in (None, 7):
        mask = pattern_of(layout, chosen, max_count=max_count).mask
        blocks = mask.to_dense()
        assert torch.equal(blocks[..., :7, :7], chosen)
        assert blocks[..., 7:, :].all() and blocks[..., 7:].all()
        assert torch.equal(mask.lengths_k[0], layout.lengths()) and torch.equal(mask.lengths_q[0], layout.lengths())


@pytest.mark.parametrize(
    "fields",
    [
        {"block_size": 24},
        {"order": "hilbert"},
        {"tile": (4, 4)},
        {"tile": (4, 0, 4)},
        {"tile": (4, 4.0, 4)},
        {"tile": (True, 4, 4)},
    ],
    ids=str,
)
def test_bad_fields_of_ordered_methods(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must be"):
        Ordered(**fields)


@pytest.mark.parametrize("order", ORDERS)
def test_the_default_device_of_torch_does_not_matter(order):
    spec = TokenSpec(VideoGrid(3, 5, 6), 7)
    expected = token_order(spec.grid, order)
    with torch.device("meta"):
        found = token_order(spec.grid, order)
        layouts = [TokenLayout.build(spec, block=16, order=given) for given in (None, found)]
        layouts.append(TokenLayout.build(spec, block=16, order=tile_order(spec.grid, (2, 3, 4))[0]))
    assert torch.equal(found, expected)
    x = torch.randn(1, 2, spec.num_tokens, 4)
    for layout in layouts:
        assert torch.equal(layout.undo(layout.apply(x)), x)
