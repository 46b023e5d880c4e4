"""DraftAttention against an eager definition written from the paper."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdit.attention import MethodState, get_method
from fastdit.token_orders import fitting_tile, tile_order
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid


def means_of_tiles(x, spec, tile):
    """The means of the tokens that each tile has, ``(B, H, M, D)``, tiles in the order of ``tile_order``."""
    order, sizes = tile_order(spec.grid, tile)
    return torch.stack([x[:, :, spec.video][:, :, tokens].mean(2) for tokens in order.split(sizes.tolist())], 2)


def structured(spec, heads=3, dim=16):
    return torch.randn(2, heads, spec.num_tokens, dim) * 2, torch.randn(2, heads, spec.num_tokens, dim) * 2


@pytest.mark.parametrize("density", [0.1, 0.25, 0.6])
def test_exact_grids_follow_the_paper(density):
    """Average pooling by frame, softmax, and one threshold over all entries of a head's map."""
    frames, height, width, ph, pw = 3, 8, 12, 4, 4
    spec = TokenSpec(VideoGrid(frames, height, width))
    q, k = structured(spec)
    pattern = get_method("draft", density=density, tile=(1, ph, pw)).pattern(q, k, AttentionCall(spec), MethodState())
    blocks = pattern.mask.to_dense()
    for b in range(2):
        for h in range(3):
            draft = []
            for x in (q[b, h], k[b, h]):
                images = x.view(frames, height, width, 16).permute(0, 3, 1, 2)
                draft.append(F.avg_pool2d(images, (ph, pw)).permute(0, 2, 3, 1).reshape(-1, 16))
            attention = torch.softmax(draft[0] @ draft[1].T / 4, -1)
            excluded = math.floor((1 - density) * attention.numel() + 1e-6)
            threshold = attention.flatten().sort().values[excluded]
            expected = attention >= threshold
            own = torch.eye(len(expected), dtype=torch.bool) & ~expected.any(-1, keepdim=True)
            assert torch.equal(blocks[b, h], expected | own)


@pytest.mark.parametrize("tile", [(1, 4, 4), (4, 2, 2)], ids=str)
@pytest.mark.parametrize("density", [0.1, 0.3])
def test_per_row_every_tile_keeps_equally_many(density, tile):
    spec = TokenSpec(VideoGrid(5, 6, 10))
    q, k = structured(spec)
    pattern = get_method("draft", density=density, tile=tile, per_row=True).pattern(
        q, k, AttentionCall(spec), MethodState()
    )
    blocks, sizes = pattern.mask.to_dense(), tile_order(spec.grid, tile)[1]
    scores = means_of_tiles(q, spec, tile) @ means_of_tiles(k, spec, tile).mT / 4 + sizes.log()
    count = math.floor(density * len(sizes) + 0.5)
    assert torch.equal(blocks, torch.zeros_like(blocks).scatter(-1, scores.topk(count).indices, True))


@pytest.mark.parametrize("tile", [(1, 3, 5), (4, 2, 3), (1, 8, 16)], ids=str)
@pytest.mark.parametrize("text_first", [False, True])
def test_drafts_are_of_the_tokens_a_tile_has(tile, text_first):
    spec = TokenSpec(VideoGrid(3, 9, 11), 7, text_first)
    q, k = structured(spec)
    pattern = get_method("draft", density=0.3, tile=tile).pattern(q, k, AttentionCall(spec), MethodState())
    sizes = tile_order(spec.grid, tile)[1]
    means = (means_of_tiles(x.double(), spec, tile) for x in (q, k))
    scores = (next(means) @ next(means).mT / 4 + sizes.double().log()).log_softmax(-1)
    excluded = math.floor(0.7 * len(sizes) ** 2 + 1e-6)
    expected = scores >= scores.flatten(2).sort().values[:, :, excluded, None, None]
    expected |= torch.eye(len(sizes), dtype=torch.bool) & ~expected.any(-1, keepdim=True)
    assert torch.equal(pattern.mask.to_dense()[:, :, :-1, :-1], expected)


class OneDevice(TorchDispatchMode):
    """Refuse tensors that are not on the device ``meta``, which holds no values: nothing can wait for one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta", func
        return out


@pytest.mark.parametrize("parts", [1, 4])
def test_only_the_first_draft_of_a_shape_waits_for_the_device(parts):
    spec, state = TokenSpec(VideoGrid(2, 8, 12)), MethodState()
    method = get_method("draft", tile=(1, 4, 4), parts=parts)
    q = torch.empty(1, 2, spec.num_tokens, 8, device="meta")
    method.pattern(q, q, AttentionCall(spec), state)
    with OneDevice():
        mask = method.pattern(q, q, AttentionCall(spec), state).mask
    assert mask.num_q == 12


def test_cut_off_tiles_count_for_the_tokens_they_have():
    """With equal keys, probability mass is proportional to tile size, so whole tiles are kept first."""
    grid = VideoGrid(1, 6, 10)
    spec = TokenSpec(grid)
    q = torch.zeros(1, 1, spec.num_tokens, 8)
    pattern = get_method("draft", density=1 / 3, tile=(1, 4, 4)).pattern(q, q, AttentionCall(spec), MethodState())
    sizes = tile_order(grid, (1, 4, 4))[1].tolist()
    assert sizes == [16, 16, 8, 8, 8, 4]
    assert pattern.mask.to_dense()[0, 0].all(0).tolist() == [True, True, False, False, False, False]


def test_tiles_become_blocks():
    spec = TokenSpec(VideoGrid(2, 6, 10), 5)
    method = get_method("draft", tile=(1, 4, 6))
    q = torch.randn(1, 1, spec.num_tokens, 8)
    pattern = method.pattern(q, q, AttentionCall(spec), MethodState())
    assert method.block_size == 32 and pattern.mask.block_q == 32
    assert pattern.mask.lengths_k[0, 0].tolist() == [24, 16, 12, 8] * 2 + [5]
    first = pattern.layout.index[0, :24]
    assert sorted({(int(t) // 10, int(t) % 10) for t in first}) == [(h, w) for h in range(4) for w in range(6)]


@pytest.mark.parametrize("tile", [(1, 8, 16), (2, 7, 9), (4, 8, 8)], ids=str)
@pytest.mark.parametrize(
    ("shape", "text"), [((21, 30, 52), 0), ((21, 45, 80), 0), ((13, 30, 45), 226)], ids=lambda x: str(x)
)
def test_patterns_of_real_sizes(shape, text, tile):
    spec = TokenSpec(VideoGrid(*shape), text, text_first=True)
    q, k = torch.randn(2, 1, 2, spec.num_tokens, 4)
    pattern = get_method("draft", density=0.2, tile=tile).pattern(q, k, AttentionCall(spec), MethodState())
    blocks, video = pattern.mask.to_dense(), pattern.layout.video_blocks
    sizes = tile_order(spec.grid, tile)[1]
    assert video == len(sizes)
    assert torch.equal(pattern.mask.lengths_q[0, 0, :video], sizes.int())
    assert int(pattern.mask.lengths_q.sum()) == int(pattern.mask.lengths_k.sum()) == spec.num_tokens
    assert blocks[:, :, video:].all() and blocks[..., video:].all()
    kept = blocks[:, :, :video, :video].sum((-1, -2))
    assert (kept >= math.ceil(0.2 * video**2)).all() and (kept <= math.ceil(0.2 * video**2) + video).all()
    for tile_number in (0, video // 2, video - 1):  # the blocks are the tiles
        held = pattern.layout.index[0].split(pattern.layout.block)[tile_number]
        axes = torch.unravel_index(held[held >= 0] - spec.video.start, shape)
        assert math.prod(int(axis.amax() - axis.amin()) + 1 for axis in axes) == int(sizes[tile_number])


def test_ties_do_not_add_to_the_density():
    """Equal scores are no reason to keep more; each tile keeps one in any case."""
    spec = TokenSpec(VideoGrid(2, 16, 16))
    q = torch.zeros(1, 1, spec.num_tokens, 8)
    pattern = get_method("draft", density=0.25, tile=(1, 4, 4)).pattern(q, q, AttentionCall(spec), MethodState())
    assert int(pattern.mask.to_dense().sum()) == 8 * 32 + 24


def test_peaked_drafts_are_ranked_where_their_softmax_is_zero():
    spec = TokenSpec(VideoGrid(2, 16, 16))
    q, k = 100 * torch.randn(2, 1, 1, spec.num_tokens, 8)
    pattern = get_method("draft", density=0.25, tile=(1, 4, 4)).pattern(q, k, AttentionCall(spec), MethodState())
    means = [means_of_tiles(x.double(), spec, (1, 4, 4))[0, 0] for x in (q, k)]
    scores = (means[0] @ means[1].T / 8**0.5).log_softmax(-1)
    assert (scores.exp().float() > 0).sum() < 256, "the softmax tells too few apart"
    expected = scores >= scores.flatten().topk(256).values.min()
    own = torch.eye(32, dtype=torch.bool) & ~expected.any(-1, keepdim=True)
    assert torch.equal(pattern.mask.to_dense()[0, 0], expected | own)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("parts", [2, 4, 16])
def test_parts_of_tiles_are_keys_as_heavy_as_they_have_tokens(parts, per_row):
    """Tiles of 20 or 8 tokens in blocks of 32: each run of 32 / parts places has a mean, as far as it has tokens."""
    spec, tile, density = TokenSpec(VideoGrid(2, 6, 10)), (1, 4, 5), 0.3
    q, k = structured(spec)
    method = get_method("draft", density=density, tile=tile, per_row=per_row, parts=parts)
    blocks = method.pattern(q, k, AttentionCall(spec), MethodState()).mask.to_dense()
    order, sizes = tile_order(spec.grid, tile)
    runs = [run for tokens in order.split(sizes.tolist()) for run in tokens.split(32 // parts)]
    owner = torch.tensor([n for n, size in enumerate(sizes.tolist()) for _ in range(math.ceil(size * parts / 32))])
    weights = torch.tensor([len(run) for run in runs], dtype=torch.float64)
    means = [torch.stack([x[:, :, run].double().mean(2) for run in runs], 2) for x in (q, k)]
    attention = (means[0] @ means[1].mT / 4 + weights.log()).softmax(-1) * weights[:, None]
    inside = torch.nn.functional.one_hot(owner).double()
    scores = inside.T @ attention @ inside / sizes[:, None]
    if per_row:
        expected = scores.topk(math.floor(density * len(sizes) + 0.5)).indices
        expected = torch.zeros_like(blocks).scatter(-1, expected, True)
    else:
        excluded = math.floor((1 - density) * len(sizes) ** 2 + 1e-6)
        expected = scores >= scores.flatten(2).sort().values[:, :, excluded, None, None]
        expected |= torch.eye(len(sizes), dtype=torch.bool) & ~expected.any(-1, keepdim=True)
    assert torch.equal(blocks, expected)


@pytest.mark.parametrize("parts", [0, 3, 128, 2.0, True])
def test_bad_parts(parts):
    allowed = "divide a block of 64 tokens" if parts in (3, 128) else "be a whole number of at least 1"
    with pytest.raises(ValueError, match=f"parts must {allowed}, got {parts}"):
        get_method("draft", tile=(1, 8, 8), parts=parts)


@pytest.mark.parametrize("tile", [(1, 8), (0, 8, 8), (4, 16, 16), (1.0, 8, 8)])
def test_bad_tiles(tile):
    with pytest.raises(ValueError, match="tile must be"):
        get_method("draft", tile=tile)


REAL = {
    "wan-480p": ((21, 30, 52), (16, 8)),
    "wan-720p": ((21, 45, 80), (8, 16)),
    "ltx": ((21, 15, 22), (5, 22)),
    "mochi": ((28, 30, 53), (16, 8)),
    "cogvideox": ((13, 30, 45), (8, 16)),
    "hunyuan": ((33, 45, 80), (8, 16)),
}


@pytest.mark.parametrize("model", REAL)
def test_without_a_tile_the_one_of_least_padding_is_taken(model):
    shape, expected = REAL[model]
    grid = VideoGrid(*shape)
    assert fitting_tile(grid, (1, 8, 16)) == (1, *expected)
    shapes = [(1, h, w) for h in range(4, 17) for w in range(8, 33) if h * w <= 128]
    counts = {tile: math.ceil(shape[1] / tile[1]) * math.ceil(shape[2] / tile[2]) for tile in shapes}
    assert counts[(1, *expected)] == min(counts.values())
    method = get_method("draft")
    q = torch.zeros(1, 1, grid.num_tokens, 1)
    layout = method.pattern(q, q, AttentionCall(TokenSpec(grid)), MethodState()).layout
    assert layout.block == method.block_size == 128 and layout.video_blocks == min(counts.values()) * grid.frames


def test_fitting_tiles_keep_frames_and_sides_in_bounds():
    for shape in ((1, 1, 1), (3, 2, 40), (5, 40, 2), (9, 13, 7), (2, 64, 64)):
        frames, height, width = fitting_tile(VideoGrid(*shape), (2, 4, 6))
        assert frames == 2 and 2 <= height <= 8 and 3 <= width <= 12 and height * width <= 24


@pytest.mark.parametrize("shape", [(4, 30, 52), (8, 15, 22), (4, 30, 53)], ids=str)
@pytest.mark.parametrize("density", [0.1, 0.3])
def test_fewer_tiles_do_the_same_with_less_work(shape, density):
    """Pairs that are computed, padding and all: fewer, while the real ones among them are as near to what was asked."""
    spec = TokenSpec(VideoGrid(*shape))
    q, k = torch.randn(2, 1, 2, spec.num_tokens, 8)
    fitted, published = (
        get_method("draft", density=density, tile=tile).pattern(q, k, AttentionCall(spec), MethodState()).mask
        for tile in (None, (1, 8, 16))
    )
    assert fitted.counts.sum() < 0.8 * published.counts.sum()
    assert abs(fitted.density - density) < min(0.05, abs(published.density - density) + 0.005)
